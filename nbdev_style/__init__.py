"""The lessons: executed notebooks and the modules that nbdev exports from them, `nb_05`, `nb_06`, `nb_07`.

The modules have the names of the course's (fastai, "Deep Learning from the Foundations", 2019, part 2 v3, `exp.nb_06`):
`from nbdev_style.nb_06 import *` gives its cells what they find there. They take it from `runner`, `norms` and
`experiments`. `python -m nbdev_style` makes notebooks and modules anew.
"""
