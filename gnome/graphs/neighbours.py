"""Neighbours of many periodic crystals at once, on a CPU or a GPU: every pair of atoms in every image that can be near, tried.

Cells are small, so that trying all is less work than sorting atoms into boxes.  Tried in the order of receivers, senders and
images, edges come out in that order, and the reverse of a try is known by its place: nothing is sorted.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TRIES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Bounds memory, and on a CPU keeps what is tried in its cache."""

_FAR = 3
"""Images to try along an axis above which a cell is described anew."""

_BELOW = 1e-6
"""Angstrom.  Cells are often given in round numbers: of pairs exactly at the cutoff, rounding would take some and leave others."""

_ROUGH = 1e-4
"""Part by which squared distances in FP32 may be off, with room to spare."""


@dataclass(frozen=True)
class Edges:
    """Edges of crystals one after the other, by receiver.

    senders, receivers, reverse (E,) int64 counted within each crystal, the last the number of the edge that goes the other way;
    cell_shift (E, 3) int64, the image of the receiver; vectors (E, 3) from sender to receiver, angstrom; n_edge (B,) int64.
    """

    senders: Tensor
    receivers: Tensor
    reverse: Tensor
    cell_shift: Tensor
    vectors: Tensor
    n_edge: Tensor


def find_neighbours(lattices: Tensor, frac_coords: Tensor, n_atoms: Tensor, cutoff: float) -> Edges:
    """Find all pairs nearer than `cutoff` angstrom in crystals: lattices (B, 3, 3), frac_coords (N, 3), n_atoms (B,), on one device.

    Needs cells that are not degenerate (`gnome.crystals.validity`): the number of images grows as they become flat.  Oblique cells are
    described by shorter vectors first.
    """
    cutoff -= _BELOW
    reach = _reach(lattices, cutoff)
    oblique = (reach.amax(1) > _FAR).nonzero()[:, 0].tolist()
    if oblique:
        changes = torch.eye(3, dtype=lattices.dtype, device=lattices.device).repeat(len(lattices), 1, 1)
        for i in oblique:
            changes[i] = _shorter_vectors(lattices[i]).to(lattices)
        lattices = changes @ lattices
        owner = torch.repeat_interleave(n_atoms)
        frac_coords = torch.einsum("ni,nij->nj", frac_coords, torch.linalg.inv(changes)[owner])
        reach = _reach(lattices, cutoff)
    edges = _all_chunks(lattices, frac_coords, n_atoms, reach, cutoff)
    if oblique:
        back = changes.round().long()[torch.repeat_interleave(edges.n_edge)]
        edges = replace(edges, cell_shift=(edges.cell_shift[:, :, None] * back).sum(1))
    return edges


def _shorter_vectors(lattice: Tensor) -> Tensor:
    """Whole combinations (3, 3) of a cell's vectors that are shorter: of each, what lies along another is taken off while that helps."""
    vectors, change = lattice.cpu().clone(), torch.eye(3, dtype=lattice.dtype)
    helped = True
    while helped:
        helped = False
        for i, j in itertools.permutations(range(3), 2):
            times = (vectors[i] @ vectors[j] / (vectors[j] @ vectors[j])).round()
            shorter = vectors[i] - times * vectors[j]
            if times and shorter @ shorter < (1 - 1e-9) * (vectors[i] @ vectors[i]):
                vectors[i], helped = shorter, True
                change[i] -= times * change[j]
    return change


def _all_chunks(lattices: Tensor, frac_coords: Tensor, n_atoms: Tensor, reach: Tensor, cutoff: float) -> Edges:
    """Try all crystals, as many at once as memory is to hold."""
    tries = n_atoms.square() * (2 * reach + 1).prod(1)
    starts = torch.nn.functional.pad(n_atoms.cumsum(0), (1, 0))
    parts = [
        _try_all(lattices[rows], frac_coords[starts[rows.start] : starts[rows.stop]], n_atoms[rows], reach[rows], cutoff)
        for rows in _chunks(tries.tolist(), TRIES_AT_ONCE[lattices.device.type])
    ]
    if not parts:
        none = torch.zeros(0, dtype=torch.long, device=lattices.device)
        return Edges(none, none, none, none.reshape(0, 3), frac_coords.new_zeros(0, 3), none)
    return Edges(*(torch.cat([getattr(part, name) for part in parts]) for name in Edges.__dataclass_fields__))


def _reach(lattices: Tensor, cutoff: float) -> Tensor:
    """Images to try each way along each axis (B, 3), for atoms at most half a cell apart."""
    normals = torch.stack([torch.linalg.cross(lattices[:, (k + 1) % 3], lattices[:, (k + 2) % 3]) for k in range(3)], 1)
    heights = torch.linalg.det(lattices).abs()[:, None] / normals.norm(dim=2)
    return torch.floor(cutoff / heights + 0.5 + 1e-9).long()


def _chunks(tries: list[int], limit: int) -> list[slice]:
    """Runs of crystals with at most so many tries together, at least one crystal each."""
    chunks, start, total = [], 0, 0
    for i, own in enumerate(tries):
        if i > start and total + own > limit:
            chunks.append(slice(start, i))
            start, total = i, 0
        total += own
    return [*chunks, slice(start, len(tries))] if tries else []


def _numbered(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (n,): the owner of each of their sum, and its number within the owner."""
    owner = torch.repeat_interleave(counts)
    begin = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - begin[owner]


def _try_all(lattices: Tensor, frac: Tensor, n_atoms: Tensor, reach: Tensor, cutoff: float) -> Edges:
    """Try every pair in every image."""
    crystal, number = _numbered(n_atoms.square())
    n = n_atoms[crystal]
    receiver, sender = number // n, number % n
    first = (n_atoms.cumsum(0) - n_atoms)[crystal]
    apart = frac[first + receiver] - frac[first + sender]
    rounded = apart.round()
    between = torch.einsum("pi,pij->pj", apart - rounded, lattices[crystal])

    width = 2 * reach + 1
    n_images = width.prod(1)
    of_crystal, place = _numbered(n_images)
    own = width[of_crystal]
    image = (
        torch.stack([place // (own[:, 1] * own[:, 2]), place // own[:, 2] % own[:, 1], place % own[:, 2]], 1) - reach[of_crystal]
    )
    shift = torch.einsum("mi,mij->mj", image.to(frac.dtype), lattices[of_crystal])

    tries = n_images[crystal]  # of each pair
    pair_start = tries.cumsum(0) - tries
    image_start = (n_images.cumsum(0) - n_images)[crystal]
    pair = torch.repeat_interleave(tries)
    try_image = torch.arange(len(pair), device=frac.device) - (pair_start - image_start).index_select(0, pair)
    rough = torch.zeros(len(pair), dtype=torch.float32, device=frac.device)
    for axis in range(3):  # in FP32 first, which spares most of the memory traffic
        ends = between[:, axis].float().index_select(0, pair), shift[:, axis].float().index_select(0, try_image)
        rough += torch.add(*ends).square_()
    likely = (rough <= cutoff * cutoff * (1 + _ROUGH)).nonzero()[:, 0]
    own_pair, own_image = pair[likely], try_image[likely]
    exact = between.index_select(0, own_pair) + shift.index_select(0, own_image)
    m = own_image - image_start[own_pair]
    itself = (receiver == sender)[own_pair] & (m == tries[own_pair] // 2)
    kept = (exact.square().sum(1) <= cutoff * cutoff) & ~itself
    found, edge_pair, m = likely[kept], own_pair[kept], m[kept]
    near = torch.zeros(len(pair), dtype=torch.int32, device=frac.device)
    near[found] = 1

    edge_crystal = crystal[edge_pair]
    n_edge = torch.bincount(edge_crystal, minlength=len(n_atoms))
    first_pair = (n_atoms.square().cumsum(0) - n_atoms.square())[edge_crystal]
    other_way = first_pair + sender[edge_pair] * n_atoms[edge_crystal] + receiver[edge_pair]
    opposite = pair_start[other_way] + n_images[edge_crystal] - 1 - m
    edge_number = near.cumsum(0, dtype=torch.int32).long() - 1
    return Edges(
        sender[edge_pair],
        receiver[edge_pair],
        edge_number[opposite] - (n_edge.cumsum(0) - n_edge)[edge_crystal],
        image[own_image[kept]] - rounded[edge_pair].long(),
        exact[kept],
        n_edge,
    )
