"""Adam in the eigenbasis of every layer's input: what to do with a layer whose inputs go together.

The gradient of a layer's weights is a sum of outer products g a^T, a the input, for a convolution the patch under its
kernel. Neighbouring pixels go together, so some directions of a are a hundred times as long as others, and one rate
for all is too small for the short ones. Adam has a rate per coordinate, which helps if the coordinates are the
directions: so turn the weights into the eigenvectors of E[a a^T], step there, and turn back.

Sources: J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015), for
A = E[a a^T] as the input's factor of the curvature; T. George et al., "Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis" (2018), for second moments of the gradient in that basis; N. Vyas et al., "SOAP" (2024),
for Adam in it. Here only the input's side is turned.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from experiments.optimizer import Optimizer
from experiments.study.stacked_layers import GroupedLinear

SINCE = 0.005       # the least weight of new inputs in A: about the last 200 looks count
TIES = 1e-3         # of A's mean eigenvalue
EARLY = (4, 12, 25, 50)     # renewals of the direction after which the basis is found anew besides every `refresh`-th

Layer = nn.Conv2d | nn.Linear | GroupedLinear
State = dict[str, Any]      # a parameter's, as torch's optimizers keep it: tensors, and numbers


class EigenAdam(Optimizer):
    """Adam (D. Kingma, J. Ba, 2014), for layers' weights in the eigenbasis of their inputs.

        A <- average of a a^T          A = Q diag(..) Q^T            a: the layer's inputs, `(d,)` each
        m, v <- averages of G Q and its square                       G: mean gradient, `(no, d)`
        U = m / (sqrt(v) + eps) Q^T                                  m and v divided by their debiasing weights
        W <- W - lr U

    Biases and the norms' weights are stepped in their own coordinates, as by Adam. A direction U is renewed every
    `every` steps, from the mean of the gradients since, and W moves along it at each step: the products with Q are
    the cost. Inputs are looked at every 16th step. The basis moves with A, by one orthogonal iteration at a time, so
    that m and v stay what they are. Up to the fourth renewal, and for inputs that were 0 until then, it is that of the
    weights.

    Args:
        model: the network; the optimizer takes all its parameters, and inputs of its `nn.Conv2d`, `nn.Linear` and
            `GroupedLinear` layers, by hooks that `close()` removes.
        lr: rate, the length of a step per coordinate; also a tensor `(K,)`, a rate for each of K networks in a `stack`.
        betas: what stays of m and of v at each renewal.
        eps: keeps quiet coordinates quiet.
        every: steps between renewals.
        refresh: renewals between two moves of the basis.

    Raises:
        ValueError: an `lr` that isn't positive, a convolution with dilation, or padding that isn't zeros.
    """

    def __init__(self, model: nn.Module, lr: float | Tensor = 0.002, betas: tuple[float, float] = (0.7, 0.996),
                 eps: float = 1e-8, *, every: int = 4, refresh: int = 125) -> None:
        if not torch.as_tensor(lr > 0).all():
            raise ValueError(f"EigenAdam got lr={lr!r}; it needs a positive number, such as 0.002")
        super().__init__(model.parameters(), {"lr": lr, "betas": betas, "eps": eps, "steps": 0})
        self.every, self.refresh = every, refresh
        self.handles: list[RemovableHandle] = []
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, GroupedLinear)):
                groups = getattr(layer, "groups", 1)
                if isinstance(layer, nn.Conv2d) and (layer.dilation != (1, 1) or layer.padding_mode != "zeros"
                                                     or isinstance(layer.padding, str)):
                    raise ValueError(f"EigenAdam can't take the inputs of {layer}; it needs a convolution without "
                                     "dilation, padded by zeros or not at all, its padding given as a number")
                self.state[layer.weight]["groups"] = groups
                self.handles.append(layer.register_forward_pre_hook(self.look))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles: handle.remove()

    @torch.no_grad()
    def look(self, layer: Layer, args: tuple[Tensor, ...]) -> None:
        """Take a layer's inputs into A, in the first 20 steps and then in every 16th."""
        steps = self.param_groups[0]["steps"]
        if not layer.training or (steps >= 20 and steps % 16): return
        state, k = self.state[layer.weight], self.state[layer.weight]["groups"]
        a = patches(layer, args[0], k)                                                  # (K, d, values)
        new = torch.bmm(a, a.transpose(1, 2)) / a.shape[2]                              # (K, d, d)
        looks = state["looks"] = state.get("looks", 0) + 1
        state["A"] = new if looks == 1 else state["A"].lerp_(new, max(1 / looks, SINCE))

    def update(self) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            group["steps"] += 1
            renew, renewals = group["steps"] % self.every == 0, group["steps"] // self.every
            for p in group["params"]:
                if p.grad is None: continue
                state = self.state[p]
                if "G" not in state:
                    for name in ("G", "U", "m", "v"): state[name] = torch.zeros_like(p)
                state["G"].add_(p.grad, alpha=1 / self.every)
                if renew: self.renew(p, state, group, renewals)
                lr = group["lr"]
                if not torch.is_tensor(lr): p.add_(state["U"], alpha=-lr)
                else: p.view(len(lr), -1).addcmul_(state["U"].view(len(lr), -1), lr.to(p)[:, None], value=-1)

    def renew(self, p: Tensor, state: State, group: dict[str, Any], n: int) -> None:
        """Make the direction U of `p` from the gradient G since the last of `n` renewals."""
        if "A" in state and (n in EARLY or n % self.refresh == 0): self.turn(state)
        beta1, beta2 = group["betas"]
        g = into(state["G"], state)
        m = state["m"] = state["m"].lerp_(g, 1 - beta1)
        v = state["v"] = state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = m / (v / (1 - beta2**n)).sqrt_().add_(group["eps"]) / (1 - beta1**n)
        state["U"] = back(step, state)
        state["G"].zero_()

    @staticmethod
    def turn(state: State) -> None:
        """Find the basis Q `(K, d', d')` of A, or move it with A; d' of the d inputs were other than 0 so far."""
        if "Q" not in state:
            # A kernel wider than its map has positions that see padding alone: no input, no gradient, and so no cost.
            state["live"] = state["A"].diagonal(dim1=1, dim2=2).amax(0).nonzero().flatten()
        live = state["live"].long()
        a = state["A"][:, live][:, :, live]
        # Directions that no input has had yet are all alike to A, and rounding would choose among them.
        d = a.shape[2]
        a = a + torch.diag_embed(a.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
                                 * TIES * torch.linspace(2, 1, d, dtype=a.dtype, device=a.device))
        state["Q"] = (torch.linalg.qr(a @ state["Q"])[0] if "Q" in state
                      else torch.linalg.eigh(a)[1].flip(2).contiguous())


def patches(layer: Layer, x: Tensor, k: int) -> Tensor:
    """What `k` groups of a layer's kernels see of `x`: `(K, d, images x positions)`."""
    if not isinstance(layer, nn.Conv2d): return x.reshape(len(x), k, -1).permute(1, 2, 0)
    assert not isinstance(layer.padding, str)       # which EigenAdam refuses
    cols = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)       # (N, C kh kw, L)
    return cols.view(len(x), k, -1, cols.shape[2]).permute(1, 2, 0, 3).flatten(2)


def into(g: Tensor, state: State) -> Tensor:
    """The gradient `g` in the basis of `state`, the same shape: what the basis leaves out keeps its own coordinates."""
    return _turned(g, state, lambda rows, q: torch.bmm(rows, q))


def back(u: Tensor, state: State) -> Tensor:
    """The step `u` from the basis of `state` in the weight's own coordinates."""
    return _turned(u, state, lambda rows, q: torch.bmm(rows, q.transpose(1, 2)))


def _turned(t: Tensor, state: State, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if "Q" not in state: return t
    # load_state_dict gives `live` the weight's dtype
    rows, live = t.reshape(state["groups"], -1, state["A"].shape[2]), state["live"].long()  # (K, no, d)
    if len(live) == rows.shape[2]: return turn(rows, state["Q"]).view_as(t)
    new = rows.clone()
    new[:, :, live] = turn(rows[:, :, live], state["Q"])
    return new.view_as(t)
