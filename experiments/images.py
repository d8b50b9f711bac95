"""The images of a process: loaded once for all arms that it trains on them."""

import json
from collections.abc import Sequence

from experiments.data import load_data
from experiments.image_data import ImageData
from experiments.settings import ImageSettings

_loaded: dict[str, ImageData] = {}      # the last images of this process, by what was asked for


def load_images(config: ImageSettings, auto: Sequence[str] = ("MNIST",)) -> ImageData:
    """The images that `config` names; `auto` is for `load_data`."""
    return load_data(config.data, config.data_dir, config.limit, auto)


def images_of(config: ImageSettings) -> ImageData:
    """The images of an arm, which this process has loaded already or loads now."""
    if (asked := _asked(config)) not in _loaded: keep_loaded(config, load_images(config))
    return _loaded[asked]


def _asked(config: ImageSettings) -> str: return json.dumps([config.data, str(config.data_dir), config.limit])


def keep_loaded(config: ImageSettings, images: ImageData) -> None:
    """Have `images` for the arms of `config`, and no others."""
    _loaded.clear()
    _loaded[_asked(config)] = images
