"""`Runner.explain`: the loop as text, each event with the callbacks that answer it; the runner as a table."""

from collections.abc import Iterable
from typing import Any

from runner.events import EVENTS, STEPS, Callback
from runner.notebook import html_table

# The loop of `Runner.fit`, `all_batches` and `one_batch`: (depth, event or None, what the loop does there).
LOOP: tuple[tuple[int, str | None, str], ...] = (
    (0, "begin_fit", ""),
    (0, None, "for each epoch:"),
    (1, "begin_epoch", ""),
    (1, None, "for each training batch:"),
    (2, "begin_batch", ""), (2, None, "pred = model(xb)"),
    (2, "after_pred", ""), (2, None, "loss = loss_func(pred, yb)"),
    (2, "after_loss", ""), (2, None, "loss.backward()"),
    (2, "after_backward", ""), (2, None, "opt.step()"),
    (2, "after_step", ""), (2, None, "opt.zero_grad()"),
    (2, "after_batch", ""),
    (1, "begin_validate", ""),
    (1, None, "for each validation batch, without gradients:"),
    (2, "begin_batch", ""), (2, None, "pred = model(xb)"),
    (2, "after_pred", ""), (2, None, "loss = loss_func(pred, yb)"),
    (2, "after_loss", ""), (2, "after_batch", ""),
    (1, "after_epoch", ""),
    (0, "after_fit", ""),
    (0, None, "if cancelled:"),
    (1, "after_cancel_batch", ""), (1, "after_cancel_epoch", ""), (1, "after_cancel_train", ""),
)

STEP_OF = {"pred = model(xb)": "predict", "loss = loss_func(pred, yb)": "get_loss", "loss.backward()": "backward",
           "opt.step()": "step", "opt.zero_grad()": "zero_grad"}


def explanation(cbs: Iterable[Callback]) -> str:
    """The loop as text, with the callbacks out of `cbs` that answer each event, in the order of their calls.

    Where callbacks take over a step of the loop or wrap it, its name and theirs stand beside it.
    """
    ordered = sorted(cbs, key=lambda cb: cb._order)
    # One with a `__call__` of its own is called at every event, and only it knows which it answers.
    always = [cb for cb in ordered if not isinstance(cb, Callback) or type(cb).__call__ is not Callback.__call__]
    width = 2 + max(2 * depth + len(event) for depth, event, _ in LOOP if event)

    def names(cbs: Iterable[Callback]) -> str: return ", ".join(type(cb).__name__ for cb in cbs)

    def line(depth: int, event: str | None, step: str) -> str:
        if event is None:
            name = STEP_OF.get(step)
            taken = names(cb for cb in ordered if name and hasattr(type(cb), name))
            text, answers = "  " * depth + step, f"{name}: {taken}" if taken else ""
        else:
            text = "  " * depth + event
            answers = names(cb for cb in ordered if cb not in always and cb.handler(event) is not None)
        return f"{text:{width}}{'  ' * (len(text) >= width)}{answers}".rstrip()
    lines = [line(*entry) for entry in LOOP]
    if always: lines.append(f"at every event: {names(always)}")
    return "\n".join(lines)


def table(cbs: Iterable[Any], note: str) -> str:
    """The callbacks in the order of their calls, as a table in HTML: name, class, `_order`, and what they answer."""
    def answers(cb: Any) -> str:
        if not isinstance(cb, Callback) or type(cb).__call__ is not Callback.__call__: return "every event"
        return ", ".join(name for name in (*EVENTS, *STEPS) if name in vars(cb) or hasattr(type(cb), name)) or "-"
    return html_table(("name", "callback", "order", "answers"), [
        (f"run.{cb.name}", type(cb).__name__, cb._order, answers(cb))
        for cb in sorted(cbs, key=lambda cb: cb._order)], note)
