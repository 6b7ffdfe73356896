r"""Spectrum: recurrent weights under Dale's principle with the spectrum of the original weights.

Recurrent activity passes the same weights W at every step. The eigenvalues λ of W decide whether it grows; the singular
values σ decide how evenly W passes the directions of activity and of gradients. Signs spoil both. They give W a
mean, $\mathbf{1} m^\top$ with $m_j = s_j\,\langle\lvert w_{ij}\rvert\rangle_i$, which adds an eigenvalue, $\sum_j m_j$,
and a singular value, at least $\sum_{ij} \lvert w_{ij}\rvert / n$. The eigenvalue vanishes if rows sum to zero (Rajan &
Abbott 2006). The singular value does not: it is small only if rows have few synapses.

References:
    Rajan & Abbott, Eigenvalue spectra of random matrices for neural networks, Physical Review Letters 97, 2006. Song,
    Yang & Wang, Training excitatory-inhibitory recurrent neural networks for cognitive tasks, PLOS Computational
    Biology 12, 2016. Li, Cornford, Ghosh & Richards, Learning better with Dale's Law: a spectral perspective, NeurIPS
    2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_SYNAPSES = 2  # of each sign in a row, if it has them: a ReLU unit with one responds only while that one is active
MIN_UNITS = 8  # smaller networks are not balanced, because that costs one singular value, which is one of few
MAX_RESCALING = 4.0  # factor by which restoring the spectral radius may change the size of the weights
TINY = 1e-300


def spectral_radius(weight: Tensor) -> float:
    r"""Largest magnitude of an eigenvalue, $\rho(W) = \max_i \lvert\lambda_i\rvert$."""
    return float(torch.linalg.eigvals(weight.detach().double().cpu()).abs().max())


def singular_entropy(weight: Tensor) -> float:
    r"""Normalised entropy of the singular values, from 0 (one direction passes) to 1 (all pass alike).

    $$H = -\frac{1}{\ln n} \sum_{i=1}^{n} p_i \ln p_i, \qquad p_i = \frac{\sigma_i}{\sum_k \sigma_k}$$

    with $\sigma_1, \dots, \sigma_n$ the singular values (Li et al. 2023). H is 1 for a single singular value, and 0 for
    a weight that is 0.
    """
    values = torch.linalg.svdvals(weight.detach().double())
    total = values.sum()
    if total == 0 or len(values) == 1:
        return float(total > 0)
    return float(torch.special.entr(values / total).sum()) / math.log(len(values))


def balanced_recurrent(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    r"""Sparse recurrent weights with the signs of their units and the original spectral radius.

    $$w_{ij} = g\, c_i\, s_j\, k_{ij}\, \frac{\lvert w^0_{ij} \rvert}{x_{ij}}, \qquad
    x_{ij} = \sum_{l:\, s_l = s_j} k_{il}\, \lvert w^0_{il} \rvert$$

    with $w^0_{ij}$ the free weight from unit j to unit i, $s_j$ the sign of unit j, $k_{ij}$ 1 for the synapses that
    row i keeps and else 0, $x_{ij}$ the sum of row i over units with the sign of j, $c_i$ the factor with which
    row i keeps its energy $\sum_j w_{ij}^2$, and g the factor with which W keeps its spectral radius ρ.

    *Which synapses are kept.* Of each sign, a row keeps `density` times the number of its synapses of the *other* sign,
    if it has as many, and at least `MIN_SYNAPSES`. So excitation by four of five units is sparse and strong, inhibition
    is dense and weak, and all columns have the same energy. Columns that have few synapses come first, so that all have
    about equally many. A row draws its synapses at rates $(w^0_{ij})^2$, so it keeps one that has most of its energy,
    and omits zeros.

    *What is preserved.* Signs, zero row sums and ρ hold to rounding. Entropy H and norm change; means over 32 draws
    of uniform or normal weights, 50% or 80% excitatory (in brackets: 16 draws of orthogonal ones, whose H was 1):

    | density | ΔH, n = 16 | ΔH, n = 64 | ΔH, n = 256 | norm, n = 64 |
    |---|---|---|---|---|
    | 0.1 | −0.02 (−0.10) | 0.00 (−0.05) | 0.00 (−0.04) | × 1.06 (1.01) |
    | 0.5 | −0.04 (−0.11) | −0.03 (−0.07) | −0.02 (−0.05) | × 1.29 (1.18) |
    | 1.0 | −0.08 (−0.15) | −0.05 (−0.10) | −0.03 (−0.07) | × 1.66 (1.43) |
    | \|w⁰\|·s | −0.09 (−0.15) | −0.06 (−0.10) | −0.04 (−0.07) | × 1 (1); ρ × 0.6 to 8 |

    *What cannot be balanced.* A row whose synapses have one sign keeps one of them: k would give W an eigenvalue √k
    times the others. So a network of one sign becomes almost a permutation, and the identity becomes diag(s), with
    ρ, H and norm as before. Fewer units than `MIN_UNITS` keep all synapses, unbalanced. If ρ was 0, or if the norm had
    to change by more than `MAX_RESCALING` for it, rows keep their energy instead.

    Args:
        weight: free weights from n units to themselves, shape (n, n), rows postsynaptic; of stacked gates, one gate.
        sign: +1 or −1 for each presynaptic unit, shape (n,). Columns of units with sign 0 are not changed, and ρ is
            that of the weights among the others.
        density: fraction of all synapses that is kept, in (0, 1], as long as rows have enough of both signs.
        generator: a CPU generator, which draws the synapses that are kept.
    """
    old, s = weight.detach().double().cpu(), sign.detach().double().cpu()
    own = s != 0
    new = old.abs() * s
    if int(own.sum()) >= MIN_UNITS:
        new = _with_zero_row_sums(new * _kept_synapses(old, s, density, generator))
    new = new * ((old * own).norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True).clamp(min=TINY))
    if bool(own.any()):
        before, after = (spectral_radius(w[own][:, own]) for w in (old, new))
        if after > 0 and after / MAX_RESCALING <= before <= after * MAX_RESCALING:
            new = new * (before / after)
    return torch.where(own, new, old).to(weight)


def _kept_synapses(weight: Tensor, sign: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Mask of the synapses that each row keeps."""
    excitatory, inhibitory = ((weight != 0) & (s > 0) for s in (sign, -sign))
    e, i = excitatory.sum(1), inhibitory.sum(1)
    fraction = (MIN_SYNAPSES / torch.minimum(e, i).clamp(min=1)).clamp(min=density)
    mask = torch.zeros_like(excitatory)
    for own, count, others in ((excitatory, e, i), (inhibitory, i, e)):
        wanted = torch.minimum(count, (fraction * others).round().clamp(min=1))
        mask |= _drawn_synapses(weight, own, wanted, generator)
    return mask


def _drawn_synapses(weight: Tensor, own: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Mask of `count` random synapses of each row, mostly from the columns that have the fewest so far."""
    energy = weight.square()
    rate = energy / energy.mean(1, keepdim=True).clamp(min=TINY)
    # An exponential race: the shortest waits are a draw without replacement, in proportion to the rates.
    wait = torch.empty_like(weight).exponential_(generator=generator) / rate
    wait = wait.masked_fill(~own, torch.inf)
    mask, load = torch.zeros_like(own), torch.zeros_like(weight[0])
    for row in torch.randperm(len(weight), generator=generator).tolist():
        first = (load + wait[row]).topk(int(count[row]), largest=False).indices
        mask[row, first] = True
        load[first] += 1
    return mask & own


def _with_zero_row_sums(weight: Tensor) -> Tensor:
    """Weights whose rows sum to zero, if they have both signs."""
    e, f = weight.clamp(min=0), weight.clamp(max=0)
    x, y = e.sum(1, keepdim=True), -f.sum(1, keepdim=True)
    return torch.where((x > 0) & (y > 0), e * y + f * x, weight)
