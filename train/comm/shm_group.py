"""Workers of one machine that meet in shared memory: nothing passes through the kernel.

Where the kernel lets ranks read each other's memory (train/comm/reading), every rank adds up its slice of a large
buffer from all buffers as they lie, and copies the other slices from those who added them. Else the buffer goes through
in pieces: every rank copies its piece to where all see it (but for its own slice), adds up its own slice over all
ranks, and copies the other slices back; one barrier a piece, as three pieces are in hand at once.
Sums run over ranks 0, 1, 2 ... in this order, whatever the sizes and whoever adds.
"""

import os
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from train.comm.mailbox import Mailbox
from train.comm.peers import Peers
from train.comm.reading import Neighbours, Readable, may_read
from train.comm.segment import CROWDED_SPIN_S, SEMAPHORE_BYTES, SPIN_S, Segment, Semaphore
from train.comm.turns import Turns, check_rank, check_summed, flat

IN_HAND = 3
SMALL_BYTES = 32 << 10
"""Up to here every rank adds up everything by itself, which saves a barrier."""
FEW = 8
"""Workers up to which a group takes much memory for each."""
READ_FROM_BYTES = 512 << 10
"""From here on a buffer is read from where it lies."""
BLOCK_BYTES = 128 << 10
"""What is added at a time: it stays in a core's cache."""
LINE = 64
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "sum_shared")
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


class ShmGroup:
    """`store`, `timeout_s`, `within`: as TorchGroup's; `piece_kib`: what a rank has in each of the pieces in hand.

    read_memory: whether ranks may read each other's memory where the kernel lets them.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        device: str,
        timeout_s: float = 600.0,
        piece_kib: int | None = None,
        within: Peers | None = None,
        read_memory: bool = True,
    ) -> None:
        if not device.startswith("cpu"):
            raise ValueError(f"backend=shm moves CPU memory only, and device={device}; use backend=nccl or device=cpu")
        alone = world_size <= len(os.sched_getaffinity(0))
        if piece_kib is None:
            # What a core has just written is slow to read for another one, and a barrier costs workers that share
            # processors their turns: large pieces, as far as memory goes.
            piece_kib = 1024 if alone and world_size > FEW else 4096
        if piece_kib < 64:
            raise ValueError(f"backend.piece_kib={piece_kib} must be at least 64")
        self.rank, self.world_size = rank, world_size
        self._settings = device, timeout_s, piece_kib
        self._read_memory, self._neighbours = read_memory, None
        self._store = distributed.HashStore() if store is None else store
        self._peers = Peers("shm", rank, world_size, self._store, timeout_s, within)
        self._turns = Turns(self._peers)
        self._subgroups = self._segments = self._operations = self._piece = 0
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._piece_bytes = piece_kib << 10
        self._spin_s = SPIN_S if alone else CROWDED_SPIN_S
        if (nodes := len(set(self._peers.nodes))) > 1:
            self._peers.close()
            raise ValueError(
                f"backend=shm: the workers run on {nodes} nodes, without common memory; use backend=hybrid"
            )
        try:
            self._lay_out()
        except BaseException:
            self._peers.abort()
            raise

    def _lay_out(self) -> None:
        """[a flag for every two ranks] [signatures] [mailbox] [pieces]"""
        n = self.world_size
        signatures = n * n * SEMAPHORE_BYTES
        letters = signatures + 2 * n * LINE
        pieces = letters + Mailbox.nbytes(n)
        self._segment = self._common_segment(pieces + n * IN_HAND * self._piece_bytes, "connect")
        self._flags = self._segment.semaphores(0, n, 0 if self.rank == 0 else None)
        self._mailbox = Mailbox(self._segment, letters, self._peers)
        table = self._segment.tensor(signatures, 2 * n * LINE // 8, torch.int64)
        self._signatures = table.view(2, n, LINE // 8).numpy()
        area = self._segment.tensor(pieces, n * IN_HAND * self._piece_bytes, torch.uint8)
        self._pieces = area.view(IN_HAND, n, self._piece_bytes)
        self._typed: dict[torch.dtype, list[list[Tensor]]] = {}
        self._all_have("ready")
        self._segment.close_file()
        if n > 1:
            self._try_reading()

    def _try_reading(self) -> None:
        """All ranks read each other's memory, or none does."""
        mine = Readable()
        places = self._told("readable", mine.words)
        others = [words for rank, words in enumerate(places) if rank != self.rank]
        able = self._read_memory and all(map(may_read, others))
        if set(self._told("reads", str(able))) == {"True"}:
            self._neighbours = Neighbours(self.rank, [int(words.split()[0]) for words in places])
        self._told("read", "")  # until then all keep theirs

    def _common_segment(self, nbytes: int, operation: str) -> Segment:
        """Rank 0's; `_all_have` must follow before its file is closed."""
        self._segments += 1
        key = f"segment{self._segments}"
        if self.rank == 0:
            try:
                segment = Segment(nbytes)
            except (ValueError, OSError) as error:
                self._store.set(key, f"!{error}")
                raise
            self._store.set(key, segment.reference)
            return segment
        reference = self._peers.wait_for_key(key, operation, 0).decode() if self.world_size > 1 else ""
        if reference.startswith("!"):
            raise ValueError(reference[1:])
        try:
            return Segment(nbytes, reference)
        except OSError as error:
            raise ValueError(f"backend=shm: rank 0's memory can't be shared ({error}); use backend=gloo") from error

    def _all_have(self, what: str) -> None:
        """A barrier by way of the store, for memory whose semaphores are not known to be there."""
        if self.world_size > 1:
            self._told(f"{what}{self._segments}", "")

    def _told(self, key: str, word: str) -> list[str]:
        """Every rank's word."""
        self._store.set(f"{key}/{self.rank}", word)
        ranks = range(self.world_size)
        return [self._peers.wait_for_key(f"{key}/{peer}", "connect", peer).decode() for peer in ranks]

    def all_reduce(self, tensor: Tensor, async_op: bool = False) -> Any:
        check_summed(tensor, "shm")
        return self._turns.run("all_reduce", lambda: self._all_reduce(tensor), async_op)

    def _all_reduce(self, tensor: Tensor) -> None:
        self._sign("all_reduce", tensor)
        if self.world_size == 1:
            return
        with flat(tensor) as elements:
            if elements.nbytes <= SMALL_BYTES:
                parts = self._next_pieces(elements)
                parts[self.rank].copy_(elements)
                self._meet("all_reduce", signed=True)
                _sum(parts, elements)
            elif self._neighbours and elements.nbytes >= READ_FROM_BYTES:
                self._sum_where_they_lie(elements)
            else:
                self._sum_in_pieces(elements)

    def _sum_where_they_lie(self, elements: Tensor) -> None:
        """A rank writes its own slice, which nobody else reads before all have met, and then only the others'."""
        self._signatures[self._operations % 2, self.rank, 4] = elements.data_ptr()
        self._meet("all_reduce", signed=True)
        starts = self._signatures[self._operations % 2, :, 4].tolist()
        cuts = slices(len(elements), self.world_size)
        self._neighbours.add_up(elements, cuts, starts)
        self._meet("all_reduce")
        self._neighbours.fetch(elements, cuts, starts)
        self._meet("all_reduce")

    def _sum_in_pieces(self, elements: Tensor) -> None:
        held = None
        for piece in elements.split(self._piece_bytes // elements.element_size()):
            coming = piece, self._next_pieces(piece), slices(len(piece), self.world_size)
            self._copy_in(*coming)
            if held is not None:
                self._add_up(*held)
            self._meet("all_reduce", signed=held is None)
            if held is not None:
                self._copy_out(*held)
            held = coming
        self._add_up(*held)
        self._meet("all_reduce")
        self._copy_out(*held)

    def _copy_in(self, piece: Tensor, parts: list[Tensor], cuts: list[slice]) -> None:
        for cut in cuts[: self.rank] + cuts[self.rank + 1 :]:
            parts[self.rank][cut].copy_(piece[cut])

    def _add_up(self, piece: Tensor, parts: list[Tensor], cuts: list[slice]) -> None:
        mine = cuts[self.rank]
        terms = [(piece if peer == self.rank else part)[mine] for peer, part in enumerate(parts)]
        self._sum_in_blocks(terms, [parts[self.rank][mine], piece[mine]])

    def _copy_out(self, piece: Tensor, parts: list[Tensor], cuts: list[slice]) -> None:
        for peer, cut in enumerate(cuts):
            if peer != self.rank:
                piece[cut].copy_(parts[peer][cut])

    def _sum_in_blocks(self, terms: list[Tensor], results: list[Tensor]) -> None:
        """Block by block, which stay in cache; into the first result unless it is a term, from there to the others."""
        dtype, length = terms[0].dtype, BLOCK_BYTES // terms[0].element_size()
        scratch = None
        if any(term.data_ptr() == results[0].data_ptr() for term in terms):
            scratch = self._scratch.setdefault(dtype, torch.empty(length, dtype=dtype))
        for first in range(0, len(terms[0]), length):
            last = min(first + length, len(terms[0]))
            block = results[0][first:last] if scratch is None else scratch[: last - first]
            _sum([term[first:last] for term in terms], block)
            for result in results if scratch is not None else results[1:]:
                result[first:last].copy_(block)

    def shared(self, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        """Vectors of these sizes in memory that all ranks share; it lives as long as one of its tensors does.

        Zeros at first. Who writes where and when is the ranks' to agree on: `barrier` orders it.
        """
        return self._turns.run("shared", lambda: self._shared(sizes, dtype))

    def _shared(self, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        starts = np.cumsum([0, *(-(-size * dtype.itemsize // LINE) * LINE for size in sizes)]).tolist()
        segment = self._common_segment(max(1, starts[-1]), "shared")
        self._all_have("mapped")
        segment.close_file()
        return [segment.tensor(start, size, dtype) for start, size in zip(starts[:-1], sizes, strict=True)]

    def sum_shared(self, parts: list[Tensor], results: list[Tensor]) -> None:
        """The sum of every rank's part into all `results`: vectors of `shared`, of which `parts[rank]` is the rank's.

        Every rank adds a slice. Nobody may change a part or read a result until all have returned from here, or write
        into a result until all have come here again or to another operation.
        """
        check_summed(parts[0], "shm")
        self._turns.run("sum_shared", lambda: self._sum_shared(parts, results))

    def _sum_shared(self, parts: list[Tensor], results: list[Tensor]) -> None:
        self._sign("sum_shared", parts[0])
        self._meet("sum_shared", signed=True)
        mine = slices(len(parts[0]), self.world_size)[self.rank]
        self._sum_in_blocks([part[mine] for part in parts], [result[mine] for result in results])
        self._meet("sum_shared")

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._turns.run("all_gather", lambda: self._all_gather(tensor))

    def _all_gather(self, tensor: Tensor) -> Tensor:
        self._sign("all_gather", tensor)
        out, elements = tensor.new_empty((self.world_size, *tensor.shape)), tensor.contiguous().view(-1)
        rows, width = out.view(self.world_size, len(elements)), self._piece_bytes // tensor.element_size()
        for first in range(0, max(1, len(elements)), width):
            piece = elements[first : first + width]
            parts = self._next_pieces(piece)
            parts[self.rank].copy_(piece)
            self._meet("all_gather", signed=first == 0)
            for row, part in zip(rows, parts, strict=True):
                row[first : first + width].copy_(part)
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        check_summed(tensor, "shm")
        return self._turns.run("reduce_scatter", lambda: self._reduce_scatter(tensor))

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        self._sign("reduce_scatter", tensor)
        out = tensor.new_empty(tensor.shape[1:])
        sums = out.view(-1)
        rows = tensor.reshape(self.world_size, len(sums))
        width = self._piece_bytes // tensor.element_size() // self.world_size
        for first in range(0, max(1, len(sums)), width):
            piece = rows[:, first : first + width].contiguous()
            parts = self._next_pieces(piece.view(-1))
            parts[self.rank].copy_(piece.view(-1))
            self._meet("reduce_scatter", signed=first == 0)
            _sum([part.view(piece.shape)[self.rank] for part in parts], sums[first : first + width])
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        self._turns.run("broadcast", lambda: self._broadcast(tensor, source))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        self._sign("broadcast", tensor, source)
        width = self._piece_bytes // tensor.element_size()
        with flat(tensor) as elements:
            for first in range(0, max(1, len(elements)), width):
                piece = elements[first : first + width]
                part = self._next_pieces(piece)[source]
                if self.rank == source:
                    part.copy_(piece)
                self._meet("broadcast", signed=first == 0)
                if self.rank != source:
                    piece.copy_(part)

    def barrier(self) -> None:
        self._turns.run("barrier", self._barrier)

    def _barrier(self) -> None:
        self._sign("barrier", None)
        self._meet("barrier", signed=True)

    def send(self, tensor: Tensor, destination: int) -> None:
        check_rank(destination, self.world_size, "destination")
        self._turns.run("send", lambda: self._mailbox.exchange("send", [tensor], [], destination))

    def recv(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        self._turns.run("recv", lambda: self._mailbox.exchange("recv", [], [tensor], source))

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        check_rank(peer, self.world_size, "peer")
        self._turns.run("exchange", lambda: self._mailbox.exchange("exchange", outgoing, incoming, peer))

    def _next_pieces(self, like: Tensor) -> list[Tensor]:
        """[ranks]: where the next piece of this dtype and length lies.

        The one before it may still be read by others, the one before that no longer: between, all have met.
        """
        typed = self._typed.get(like.dtype)
        if typed is None:
            typed = self._typed[like.dtype] = [list(row.unbind()) for row in self._pieces.view(like.dtype).unbind()]
        self._piece = (self._piece + 1) % IN_HAND
        return [piece[: len(like)] for piece in typed[self._piece]]

    def _sign(self, operation: str, tensor: Tensor | None, source: int = 0) -> None:
        """Write down what this rank is about to do, for the others to compare at their next meeting."""
        self._operations += 1
        kind = DTYPES.index(tensor.dtype) if tensor is not None and tensor.dtype in DTYPES else len(DTYPES)
        size = 0 if tensor is None else tensor.numel()
        self._signatures[self._operations % 2, self.rank, :4] = OPERATIONS.index(operation), kind, size, source

    def _meet(self, operation: str, signed: bool = False) -> None:
        """Return once all have come; with `signed` ValueError where they have not come for the same."""
        since = monotonic()
        if self.rank == 0:
            for peer in range(1, self.world_size):
                self._wait(self._flags[peer][0], operation, peer, since)
            for peer in range(1, self.world_size):
                self._flags[0][peer].post()
        else:
            self._flags[self.rank][0].post()
            self._wait(self._flags[0][self.rank], operation, 0, since)
        if signed:
            table = self._signatures[self._operations % 2]
            if (table[:, :4] != table[self.rank, :4]).any():
                calls = ", ".join(f"rank {rank}: {_spell(row)}" for rank, row in enumerate(table.tolist()))
                raise ValueError(f"backend=shm: the ranks call different operations ({calls})")

    def _wait(self, semaphore: Semaphore, operation: str, peer: int, since: float) -> None:
        semaphore.wait(lambda: self._peers.check_waiting(operation, peer, since), self._spin_s)

    def subgroup(self, ranks: list[int]) -> "ShmGroup | None":
        self._subgroups += 1
        if self.rank not in ranks:
            return None
        store = distributed.PrefixStore(f"subgroup{self._subgroups}", self._store)
        return ShmGroup(ranks.index(self.rank), len(ranks), store, *self._settings, self._peers, self._read_memory)

    def abort(self) -> None:
        self._peers.abort()
        self._turns.close()

    def close(self) -> None:
        self._peers.close()
        self._turns.close()


def slices(count: int, parts: int) -> list[slice]:
    """0..count-1 in `parts` slices that begin at multiples of a cache line; the last ones may be short or empty."""
    width = -(-count // (parts * LINE)) * LINE
    return [slice(min(count, width * i), min(count, width * (i + 1))) for i in range(parts)]


def _sum(terms: list[Tensor], out: Tensor) -> None:
    """Of at least two; `out` is none of them."""
    torch.add(terms[0], terms[1], out=out)
    for term in terms[2:]:
        out.add_(term)


def _spell(signature: list[int]) -> str:
    operation, kind, size, source = signature[:4]
    name = OPERATIONS[operation]
    if name == "barrier":
        return name
    dtype = str(DTYPES[kind]).removeprefix("torch.") if kind < len(DTYPES) else "other"
    return f"{name} of {size} {dtype}" + (f" from {source}" if name == "broadcast" else "")
