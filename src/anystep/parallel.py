"""One training run on many processes, started by torchrun: DDP, FSDP2 and HSDP.

Every process draws a step's randomness for the whole batch from (seed, step), as a single one
would, and the *network calls* are shared out: each process sends its rows through its network and
all get all of the result. So n processes compute what one would, an objective knows nothing of
it, and the work is even whatever an objective asks of which network.

    DDP     every process holds everything; gradients are averaged
    FSDP2   every process holds a share of every parameter, moment, EMA and teacher
    HSDP    FSDP2 among the processes of a node, DDP among nodes
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from anystep.errors import UserError
from anystep.networks import blocks_of

Kind = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them; by default it is alone.

    Attributes:
        rank: which one this is, from 0.
        count: how many there are.
        mesh: the devices over which parameters are sharded; None when they are not.
        shard_dtype: the dtype in which shards of blocks are gathered; None is their own.
    """

    rank: int = 0
    count: int = 1
    mesh: DeviceMesh | None = None
    shard_dtype: torch.dtype | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def place(self, net: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to the device: whole, or this process's share of it.

        It is sharded in place, block by block, so that no device holds all of it.
        """
        if self.mesh is None:
            return net.to(device)
        policy = MixedPrecisionPolicy(self.shard_dtype, torch.float32, cast_forward_inputs=False)
        for block in blocks_of(net):
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # The rest, which embeds t and d, stays precise. Shards come back after every forward: an
        # EMA is updated between forwards that no backward follows.
        fully_shard(net, mesh=self.mesh, reshard_after_forward=True)
        return net

    def share(self, net: nn.Module) -> nn.Module:
        """The network as all processes call it together, each with all rows."""
        if self.alone:
            return net
        if self.mesh is None and any(p.requires_grad for p in net.parameters()):
            net = DistributedDataParallel(net)
        return SharedRows(net, self)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.alone:
            return flag
        flags = [False] * self.count
        dist.all_gather_object(flags, flag)
        return any(flags)

    def wait(self) -> None:
        """Wait until every process is here."""
        if not self.alone:
            dist.barrier()


class SharedRows(nn.Module):
    """Sends each process's share of the rows through `net`, and gives all of them to all."""

    def __init__(self, net: nn.Module, processes: Processes) -> None:
        super().__init__()
        self.net, self.processes = net, processes

    def forward(self, x: Tensor, t: Tensor, d: Tensor, cond: Tensor | None = None) -> Tensor:
        """U (B, *shape) for all rows: x (B, *shape), t (B,), d (B,), cond (B,) or None."""
        share = -(-len(x) // self.processes.count)
        first = self.processes.rank * share
        # Shares are equal, as collectives want them: the last row is repeated to fill the last.
        mine = torch.arange(first, first + share, device=x.device).clamp(max=len(x) - 1)
        u = self.net(x[mine], t[mine], d[mine], None if cond is None else cond[mine])
        whole: Tensor = GatherRows.apply(u, self.processes)  # type: ignore[no-untyped-call]
        return whole[: len(x)]


class GatherRows(torch.autograd.Function):
    """The rows of all processes, in order, on every process.

    Every process computes the loss of all rows, and in the backward pass goes on with its own,
    times the number of processes: the mean over processes that DDP and FSDP take of gradients is
    then the gradient of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: Processes) -> Tensor:
        """Rows (share, *shape) of this process -> (count * share, *shape)."""
        ctx.processes = processes
        parts = [torch.empty_like(rows) for _ in range(processes.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of this process's rows."""
        processes = ctx.processes
        return gradient.chunk(processes.count)[processes.rank] * processes.count, None


def rank() -> int:
    """Which of the processes that torchrun started this is; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def joined(
    kind: Kind, device: torch.device, shard_dtype: torch.dtype | None = None
) -> Iterator[Processes]:
    """Join the processes that torchrun started with this one; alone without torchrun.

    Around several runs it joins once for all of them. After an error nothing is waited for:
    torchrun stops the others.

    Args:
        kind: how parameters are held.
        device: of this process; a CUDA device becomes the one of its local rank.
        shard_dtype: see `Processes`.

    Raises:
        UserError: kind is "hsdp" and nodes do not have equally many processes, or this build of
            torch has no torch.distributed.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if not dist.is_available():
        raise UserError("this build of torch lacks torch.distributed: start without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    outermost = not dist.is_initialized()
    if outermost:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=fresh_store(), rank=rank(), world_size=count)
    mesh = None
    if kind == "fsdp":
        mesh = init_device_mesh(device.type, (count,))
    elif kind == "hsdp":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
        if count % local:
            raise UserError(f"hsdp needs nodes of equally many processes, not {count} on {local}")
        names = ("replicate", "shard")
        mesh = init_device_mesh(device.type, (count // local, local), mesh_dim_names=names)
    yield Processes(rank(), count, mesh, shard_dtype)
    dist.barrier()
    if outermost:
        dist.destroy_process_group()


def fresh_store() -> PrefixStore:
    """The store of torchrun, without what processes before a restart left there.

    Their addresses are found otherwise, and the first restart fails (torch 2.13).
    """
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_shards(folder: Path, tensors: dict[str, Tensor], *, merge: bool = False) -> None:
    """Write named tensors, each process its shares, as safetensors files in `folder`.

    Args:
        folder: where; made if missing.
        tensors: all processes name the same.
        merge: make one file of them.
    """
    writer = storage().HuggingFaceStorageWriter(
        str(folder), save_distributed=True, enable_consolidation=merge
    )
    save(dict(tensors), storage_writer=writer)


def storage() -> Any:
    """The module of torch that reads and writes shards as safetensors, which 2.7 lacks."""
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError:
        raise UserError(
            "sharded checkpoints need torch 2.8 or newer; use --parallel ddp"
        ) from None
    return hf_storage


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill named tensors, or shares, in place from the safetensors files in `folder`.

    However many processes wrote them.

    Raises:
        UserError: a file or tensor is missing, damaged or of another shape.
    """
    reader = storage().HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # one process may read alone
            load(dict(tensors), storage_reader=reader)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        line = " ".join(str(cause).split())
        raise UserError(f"{folder} does not fit, or is damaged ({line[:200]})") from None
