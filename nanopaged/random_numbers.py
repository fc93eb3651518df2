"""Where do a request's random numbers come from?

Not from a generator, whose next number depends on who asked before. Each number is a hash of what it is
for: of a request's seed, the index of the token that is drawn, and the token id. So all of them can be
computed at once, in any order, on any device, again and again (counter-based random numbers: Salmon et
al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
"""

from __future__ import annotations

import torch


def exponentials(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Exponentially distributed numbers (rows, vocab_size), float32, from (2, rows) int32, random bits of each row.

    Integer arithmetic makes their bits the same on every machine; only the logarithm may be rounded differently.
    """
    ids = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    bits = _mix(_mix(ids + keys[0, :, None]).bitwise_xor_(keys[1, :, None]))  # (rows, vocab_size)
    return exponential(_fold(bits, 16))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One round of a hash, in place: a bijection of 32 bits; a product moves bits up, a fold moves them down.

    The constants are those of Wellons' lowbias32 (Prospecting for Hash Functions, 2018). int32 products wrap around.
    """
    return _fold(_fold(x, 16).mul_(0x7FEB352D), 15).mul_(0x846CA68B - 2**32)


def _fold(x: torch.Tensor, shift: int) -> torch.Tensor:
    """x ^ (x >> shift), in place. int32's shift copies the sign; the mask takes the copies away."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1))


def exponential(bits: torch.Tensor) -> torch.Tensor:
    """int32 to float32 of the same shape: -log(1 - u), where u in (0, 1) are the lower 31 bits.

    Positive and finite for every bit pattern. Near 0, where races are won, it is as fine as the bits, 2**-31.
    """
    minus_u = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31))
    return minus_u.clamp_(min=2.0**-24 - 1).log1p_().neg_()  # the largest float32 below 1
