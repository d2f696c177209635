"""Classifier-free guidance: u_null + w (u_cond - u_null).

Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598); inside shortcut
targets, Frans et al. (arXiv 2410.12557), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from anystep.errors import UserError
from anystep.path import expand_to
from anystep.spec import Network


def null_condition(net: object, cond: Tensor | None) -> Tensor | None:
    """What stands for no condition, shaped like `cond` (B,), if `net` says so by `null_label`."""
    null = getattr(net, "null_label", None)
    return None if cond is None or null is None else torch.full_like(cond, null)


def check_label_dropout(share: float) -> None:
    """Raise `UserError` unless `share` is in [0, 1]."""
    if not 0 <= share <= 1:
        raise UserError(f"label_dropout must be in [0, 1], not {share}")


def drop_condition(
    cond: Tensor | None,
    null_cond: Tensor | None,
    share: float,
    generator: torch.Generator,
    *,
    keep: int = 0,
) -> Tensor | None:
    """Replace entries of `cond` (B,), but for the first `keep`, with probability `share`.

    They become those of `null_cond` (B,), which stands for no condition.
    """
    if cond is None or null_cond is None or not share:
        return cond
    drop = torch.rand(len(cond) - keep, generator=generator, device=cond.device) < share
    return torch.where(F.pad(drop, (keep, 0)), null_cond, cond)


def guided(
    net: Network,
    x: Tensor,
    t: Tensor,
    d: Tensor,
    cond: Tensor | None,
    *,
    guidance: float | Tensor,
    null_cond: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """U with guidance, conditional and unconditional rows in one network call.

    Args:
        net: the network.
        x: (B, *shape).
        t: (B,).
        d: (B,).
        cond: class ids (B,).
        guidance: strength w, a number or (B,); 0 is the unconditional u. The number 1 is the
            conditional one, for which the network is asked just once.
        null_cond: (B,), what stands for no condition.
        rows: boolean (B,), the rows to guide; all of them when None.

    Raises:
        UserError: there is no condition, or nothing that stands for its absence.
    """
    if torch.as_tensor(guidance).ndim == 0 and guidance == 1:
        return net(x, t, d, cond)
    if cond is None or null_cond is None:
        raise UserError("guidance needs a class-conditional model that knows its null label")
    # An index made where the mask is: from a mask on the CPU no device is waited for.
    rows = torch.arange(len(x)) if rows is None else torch.as_tensor(rows).nonzero().squeeze(1)
    rows = rows.to(x.device)
    extra = [a.index_select(0, rows) for a in (x, t, d, null_cond)]
    both = net(*(torch.cat(pair) for pair in zip((x, t, d, cond), extra, strict=True)))
    u, u_null = both[: len(x)], both[len(x) :]
    w = torch.as_tensor(guidance, dtype=u.dtype, device=u.device).expand(len(x))
    w = expand_to(w.index_select(0, rows), u)
    return u.index_copy(0, rows, torch.lerp(u_null, u.index_select(0, rows), w))
