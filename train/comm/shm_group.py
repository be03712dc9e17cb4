"""Workers of one machine that meet in shared memory: nothing passes through the kernel.

Where the kernel lets ranks read each other's memory (train/comm/reading), every rank adds up its slice of a large
buffer from all buffers as they lie, and copies the other slices from those who added them. Else the buffer goes through
in pieces: every rank copies its piece to where all see it (but for its own slice), adds up its own slice over all
ranks, and copies the other slices back; one barrier a piece, as three pieces are in hand at once.
Sums run over ranks 0, 1, 2 ... in this order, whatever the sizes and whoever adds.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from train.comm.arrays import add_up, array
from train.comm.mailbox import Mailbox
from train.comm.meeting import Meeting
from train.comm.peers import Peers
from train.comm.reading import Neighbours, Readable, may_read
from train.comm.segment import CROWDED_SPIN_S, LINE, SPIN_S, Segment, lines
from train.comm.turns import Turns, check_rank, check_summed, flat

IN_HAND = 3
SMALL_BYTES = LEAST_PIECE_BYTES = 64 << 10
"""Up to here one rank adds up everything, which saves a barrier."""
FEW = 8
"""Workers up to which a group takes much memory for each."""
READ_FROM_BYTES = 512 << 10
"""From here on a buffer is read from where it lies."""


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
        if piece_kib is not None and piece_kib << 10 < LEAST_PIECE_BYTES:
            raise ValueError(f"backend.piece_kib={piece_kib} must be at least {LEAST_PIECE_BYTES >> 10}")
        self.rank, self.world_size = rank, world_size
        self._settings = device, timeout_s, piece_kib
        self._read_memory, self._neighbours = read_memory, None
        self._store = distributed.HashStore() if store is None else store
        self._peers = Peers("shm", rank, world_size, self._store, timeout_s, within)
        self._turns = Turns(self._peers)
        self._subgroups = self._segments = self._piece = 0
        if (nodes := len(set(self._peers.nodes))) > 1:
            self._peers.close()
            raise ValueError(
                f"backend=shm: the workers run on {nodes} nodes, without common memory; use backend=hybrid"
            )
        try:
            alone = world_size <= self._processors()
            self._spin_s = SPIN_S if alone else CROWDED_SPIN_S
            # What a core has just written is slow to read for another one, and a barrier costs workers that share
            # processors their turns: large pieces, as far as memory goes.
            self._piece_bytes = (piece_kib or (1024 if alone and world_size > FEW else 4096)) << 10
            self._lay_out()
        except BaseException:
            self._peers.abort()
            raise

    def _lay_out(self) -> None:
        """[meeting] [mailbox] [pieces]"""
        n = self.world_size
        letters = Meeting.nbytes(n)
        pieces = letters + Mailbox.nbytes(n)
        self._segment = self._common_segment(pieces + n * IN_HAND * self._piece_bytes, "connect")
        self._meeting = Meeting(self._segment, 0, self._peers, self._spin_s)
        self._mailbox = Mailbox(self._segment, letters, self._peers)
        area = self._segment.tensor(pieces, n * IN_HAND * self._piece_bytes, torch.uint8)
        self._pieces = area.view(IN_HAND, n, self._piece_bytes)
        self._typed: dict[torch.dtype, list[Any]] = {}
        self._all_have("ready")
        self._segment.close_file()
        if n > 1:
            self._try_reading()

    def _processors(self) -> int:
        """On which any of the ranks may run: each may be bound to its own."""
        mine = os.sched_getaffinity(0)
        if self.world_size == 1:
            return len(mine)
        told = self._told("processors", " ".join(map(str, mine)))
        return len({number for numbers in told for number in numbers.split()})

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
        with flat(tensor) as elements:
            self._meeting.sign("all_reduce", elements, address=elements.data_ptr())
            if self.world_size == 1:
                return
            if elements.nbytes <= SMALL_BYTES:
                self._sum_by_one(elements)
            elif self._neighbours and elements.nbytes >= READ_FROM_BYTES:
                self._sum_where_they_lie(elements)
            else:
                self._sum_in_pieces(elements)

    def _sum_by_one(self, elements: Tensor) -> None:
        """The last rank to come adds up what all have copied in, and all copy that out."""
        parts = self._next_pieces(elements.dtype)[:, : len(elements)]
        values = array(elements)
        parts[self.rank][:] = values
        self._meeting.meet("all_reduce", signed=True, last=lambda: add_up(parts))
        values[:] = parts[0]

    def _sum_where_they_lie(self, elements: Tensor) -> None:
        """A rank writes its own slice, which nobody else reads before all have met, and then only the others'."""
        self._neighbours.prepare(elements)
        self._meeting.meet("all_reduce", signed=True)
        starts = self._meeting.addresses()
        cuts = slices(len(elements), self.world_size)
        self._neighbours.add_up(elements, cuts, starts)
        self._meeting.meet("all_reduce")
        self._neighbours.fetch(elements, cuts, starts)
        self._meeting.meet("all_reduce")

    def _sum_in_pieces(self, elements: Tensor) -> None:
        values, held = array(elements), None
        width = self._piece_bytes // elements.element_size()
        for first in range(0, len(values), width):
            piece = values[first : first + width]
            coming = piece, self._next_pieces(elements.dtype)[:, : len(piece)], slices(len(piece), self.world_size)
            self._copy_in(*coming)
            if held is not None:
                self._add_up(*held)
            self._meeting.meet("all_reduce", signed=held is None)
            if held is not None:
                self._copy_out(*held)
            held = coming
        self._add_up(*held)
        self._meeting.meet("all_reduce")
        self._copy_out(*held)

    def _copy_in(self, piece: Any, parts: Any, cuts: list[slice]) -> None:
        for cut in self._others(cuts):
            parts[self.rank][cut] = piece[cut]

    def _add_up(self, piece: Any, parts: Any, cuts: list[slice]) -> None:
        """This rank's slice: to where the first rank's part lies, and into the piece."""
        mine = cuts[self.rank]
        terms = [(piece if peer == self.rank else part)[mine] for peer, part in enumerate(parts)]
        add_up(terms, (parts[0] if self.rank == 0 else piece)[mine])

    def _copy_out(self, piece: Any, parts: Any, cuts: list[slice]) -> None:
        for cut in self._others(cuts):
            piece[cut] = parts[0][cut]

    def _others(self, cuts: list[slice]) -> tuple[slice, slice]:
        """What lies before and behind this rank's slice."""
        return slice(0, cuts[self.rank].start), slice(cuts[self.rank].stop, None)

    def shared(self, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        """Vectors of these sizes in memory that all ranks share; it lives as long as one of its tensors does.

        Zeros at first. Who writes where and when is the ranks' to agree on: `barrier` orders it.
        """
        return self._turns.run("shared", lambda: self._shared(sizes, dtype))

    def _shared(self, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
        starts = np.cumsum([0, *(lines(size * dtype.itemsize) for size in sizes)]).tolist()
        segment = self._common_segment(max(1, starts[-1]), "shared")
        self._all_have("mapped")
        segment.close_file()
        return [segment.tensor(start, size, dtype) for start, size in zip(starts[:-1], sizes, strict=True)]

    def sum_shared(self, parts: list[Tensor]) -> None:
        """The sum of every rank's part into the first part: vectors of `shared`, of which `parts[rank]` is the rank's.

        Every rank adds a slice. Nobody may change a part until all have returned from here, or the first one until all
        have read it: until they have come here again, with another vector in its place, or to another operation.
        """
        check_summed(parts[0], "shm")
        self._turns.run("sum_shared", lambda: self._sum_shared(parts))

    def _sum_shared(self, parts: list[Tensor]) -> None:
        terms = [array(part) for part in parts]
        self._meeting.sign("sum_shared", parts[0])
        if parts[0].nbytes <= SMALL_BYTES:
            self._meeting.meet("sum_shared", signed=True, last=lambda: add_up(terms))
            return
        self._meeting.meet("sum_shared", signed=True)
        mine = slices(len(parts[0]), self.world_size)[self.rank]
        add_up([term[mine] for term in terms])
        self._meeting.meet("sum_shared")

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._turns.run("all_gather", lambda: self._all_gather(tensor))

    def _all_gather(self, tensor: Tensor) -> Tensor:
        self._meeting.sign("all_gather", tensor)
        out, elements = tensor.new_empty((self.world_size, *tensor.shape)), tensor.contiguous().view(-1)
        rows, values = array(out.view(self.world_size, len(elements))), array(elements)
        width = self._piece_bytes // tensor.element_size()
        for first in range(0, max(1, len(values)), width):
            piece = values[first : first + width]
            parts = self._next_pieces(tensor.dtype)[:, : len(piece)]
            parts[self.rank][:] = piece
            self._meeting.meet("all_gather", signed=first == 0)
            rows[:, first : first + width] = parts
        return out

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        check_summed(tensor, "shm")
        return self._turns.run("reduce_scatter", lambda: self._reduce_scatter(tensor))

    def _reduce_scatter(self, tensor: Tensor) -> Tensor:
        self._meeting.sign("reduce_scatter", tensor)
        out = tensor.new_empty(tensor.shape[1:])
        sums = array(out.view(-1))
        rows = array(tensor.reshape(self.world_size, len(sums)))
        width = self._piece_bytes // tensor.element_size() // self.world_size
        for first in range(0, max(1, len(sums)), width):
            piece = rows[:, first : first + width]
            parts = self._next_pieces(tensor.dtype)[:, : self.world_size * piece.shape[1]]
            parts = parts.reshape(self.world_size, *piece.shape)
            parts[self.rank][:] = piece
            self._meeting.meet("reduce_scatter", signed=first == 0)
            total = sums[first : first + width]
            total[:] = parts[0][self.rank]
            add_up([total, *(part[self.rank] for part in parts[1:])])
        return out

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        self._turns.run("broadcast", lambda: self._broadcast(tensor, source))

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        self._meeting.sign("broadcast", tensor, source)
        width = self._piece_bytes // tensor.element_size()
        with flat(tensor) as elements:
            values = array(elements)
            for first in range(0, max(1, len(values)), width):
                piece = values[first : first + width]
                part = self._next_pieces(tensor.dtype)[source][: len(piece)]
                if self.rank == source:
                    part[:] = piece
                self._meeting.meet("broadcast", signed=first == 0)
                if self.rank != source:
                    piece[:] = part

    def barrier(self) -> None:
        self._turns.run("barrier", self._barrier)

    def _barrier(self) -> None:
        self._meeting.sign("barrier")
        self._meeting.meet("barrier", signed=True)

    def send(self, tensor: Tensor, destination: int) -> None:
        check_rank(destination, self.world_size, "destination")
        self._turns.run("send", lambda: self._mailbox.exchange("send", [tensor], [], destination))

    def recv(self, tensor: Tensor, source: int) -> None:
        check_rank(source, self.world_size, "source")
        self._turns.run("recv", lambda: self._mailbox.exchange("recv", [], [tensor], source))

    def exchange(self, outgoing: list[Tensor], incoming: list[Tensor], peer: int) -> None:
        check_rank(peer, self.world_size, "peer")
        self._turns.run("exchange", lambda: self._mailbox.exchange("exchange", outgoing, incoming, peer))

    def _next_pieces(self, dtype: torch.dtype) -> Any:
        """[ranks, elements]: where the next piece lies.

        The one before it may still be read by others, the one before that no longer: between, all have met.
        """
        if dtype not in self._typed:
            self._typed[dtype] = [array(piece) for piece in self._pieces.view(dtype)]
        self._piece = (self._piece + 1) % IN_HAND
        return self._typed[dtype][self._piece]

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
