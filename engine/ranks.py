"""Many processes, one per GPU, as torchrun starts them: `torchrun --nproc_per_node=8 grpo.py ...`.

In a single process every function here is the identity. The ranks share the work of sampling, grading, scoring and training row by
row. They gather the results, so every rank holds the Batch of the whole step and computes from it what a single process would:
rewards, advantages, denominators, FLOPs. Only log-probs, gradients and metrics are summed. No decision depends on one rank's rows, so
all ranks make the same collective calls.

--parallel ddp   Each rank has the whole model. Gradients are summed by hand, in one collective call an optimizer step.
--parallel fsdp  FSDP2 (`fully_shard`): each rank has a slice of every weight, gradient and moment of AdamW.
"""

import contextlib
import functools
import os
import pickle
import sys
import time
import types
from collections import defaultdict
from datetime import timedelta

import torch

from .errors import BadArgument, one_line

# What launchers set to other values where they start many processes: torch's own variables, Open MPI's, MPICH's and Slurm's.
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}


def rank():
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size():
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def start():
    """Join the processes of torchrun, or of any launcher that sets the variables of torch. Only rank 0 prints to stdout.

    Raises BadArgument for one of many processes that do not know of each other: each would train alone.
    """
    many = [f"{name}={os.environ[name]}" for name, alone in ALONE.items() if os.environ.get(name, alone) != alone]
    if torch.distributed.is_initialized() or not many and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise BadArgument(f"this is one of many processes ({many[0]}), but {', '.join(missing)} are not set: start them with "
                          "torchrun --nproc_per_node=K, or set these variables")
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", int(os.environ["RANK"]) % torch.cuda.device_count())))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 writes and grades while the others wait
    except (ValueError, RuntimeError) as error:
        raise BadArgument(f"{', '.join(many)}: the processes do not find each other: {one_line(error)}") from error
    if rank():
        sys.stdout = open(os.devnull, "w")


def wait():
    """Wait until every rank has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def finish():
    """Leave the other processes at the regular end. After an error torchrun ends all of them."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.5)  # gloo's threads release tensors after its calls return; an interpreter that ends first would be aborted
        torch.distributed.destroy_process_group()


def is_sharded(model):
    """Tell whether `shard` has sharded the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def own_slice(count):
    """Slice of `count` rows for this rank: adjacent ones, count / ranks rounded up; the last ranks may have fewer, or none.

    These are whole groups where the ranks divide the prompts.
    """
    size = -(-count // world_size())
    return slice(min(rank() * size, count), min((rank() + 1) * size, count))


def all_gather_list(items):
    """Join the lists of all ranks in the order of the ranks, on every rank. Tensors in them come back on the CPU."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, [item.cpu() if isinstance(item, torch.Tensor) else item for item in items])
    return sum(lists, [])


def sum_over_ranks(values):
    """Sum over ranks of a tensor, in place, or of a dict of numbers, name by name."""
    if world_size() == 1:
        return values
    if isinstance(values, torch.Tensor):
        torch.distributed.all_reduce(values)
        return values
    every = all_gather_list([dict(values)])
    return {name: sum(of_rank[name] for of_rank in every) for name in values}


def clip_grad_norm(model, max_norm):
    """Sum the gradients over ranks and clip them. Returns their norm () before clipping, the same on every rank.

    Those of a whole model must be all of one tensor, as `optimization.zero_grad` makes them: one collective call sums it.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if world_size() > 1 and is_sharded(model):
        for gradient in gradients:
            gradient.mul_(world_size())  # FSDP has averaged them
    elif world_size() > 1:
        every = gradients[0].new_empty(0).set_(gradients[0].untyped_storage())
        if {gradient.untyped_storage().data_ptr() for gradient in gradients} != {every.data_ptr()}:
            raise ValueError("the gradients are not those of zero_grad: a rank would lose some")
        torch.distributed.all_reduce(every)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return full_tensor(norm)


def shard(model, dtype):
    """Shard a model that is still on the CPU, layer by layer, onto the devices. The layers compute and are gathered in `dtype`.

    Embeddings, last norm and head stay float32 in the group of the root, as in a single process. Raises ValueError for a model that
    does not name its layers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ValueError(f"{type(model).__name__} names no layers (_no_split_modules) to shard")
    mesh = torch.distributed.device_mesh.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    # Inputs are not cast: the residual stream stays float32, and autocast does the rest.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model.run_inside_forward = types.MethodType(lambda model, function, *args, **kwargs: function(model, *args, **kwargs), model)
    register_fsdp_forward_method(model, "run_inside_forward")
    return model


def inside_fsdp_forward(function):
    """Decorator: run function(model, ...) inside the forward of a sharded model, where the root's weights are whole.

    A model with the adapter off (`lora.reference`) has it off meanwhile.
    """

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with getattr(model, "as_reference", contextlib.nullcontext)():
            return model.run_inside_forward(function, *args, **kwargs) if is_sharded(model) else function(model, *args, **kwargs)

    return run


@contextlib.contextmanager
def keep_unsharded(model):
    """Context in which the layers of a sharded model stay whole once gathered: no collective call per token of `generate`."""
    layers = [module for module in model.modules() if is_sharded(module) and module is not model]
    for layer in layers:
        layer.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def full_tensor(tensor):
    """The whole of a tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state_dict(model, trained_only=False):
    """The whole weights of a sharded model on the CPU of rank 0, gathered one by one ({} elsewhere); else the model's own.

    trained_only: without those that are frozen.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        return get_model_state_dict(model, options=options)
    if trained_only:
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model.state_dict()


def load_weights(model, file):
    """Load a safetensors file of whole weights into a model, sharded or not."""
    import safetensors.torch

    if not is_sharded(model):
        safetensors.torch.load_model(model, file, device=str(model.device))
        return
    weights, names = safetensors.torch.load_file(file), defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for same in names.values():  # of tied weights the file holds one
        stored = next((name for name in same if name in weights), None)
        weights |= dict.fromkeys(same, weights[stored]) if stored else {}
    set_weights(model, weights)


def set_weights(model, weights):
    """Load some whole weights {name: tensor} into a model, sharded or not."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        model.load_state_dict(weights, strict=False)


def save_optimizer(folder, model, optimizer):
    """Write the slices of the optimizer's state, each rank its own, by torch.distributed.checkpoint."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)


class PlainUnpickler(pickle.Unpickler):
    """Loads the classes that describe the tensors of a torch.distributed.checkpoint. Another name is refused."""

    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"}, "torch": {"Size"},
        "pathlib": {"PosixPath", "PurePosixPath"}}

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):  # of an Enum, as Python 3.11.2 writes it
            return lambda kind, member: kind[member]  # a member of an Enum, and no other attribute
        module = "pathlib" if module == "pathlib._local" else module  # Python 3.13
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in self.CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f".metadata is refused: it names {module}.{name}")
        return super().find_class(module, name)


def read_index(folder):
    """The index of a torch.distributed.checkpoint without its objects, which torch would unpickle, and without the writer's paths."""
    with open(folder / ".metadata", "rb") as file:
        index = PlainUnpickler(file).load()
    tensors = {name: kind for name, kind in index.state_dict_metadata.items() if type(kind).__name__ == "TensorStorageMetadata"}
    index.state_dict_metadata, index.storage_meta = tensors, None
    return index


def load_optimizer(folder, model, optimizer):
    """Load what `save_optimizer` wrote, on any number of ranks. Raises ValueError when a file cannot be read, or would run code."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    class Reader(checkpoint.FileSystemReader):
        def read_metadata(self, *_, **__):
            return read_index(folder)

    own = get_optimizer_state_dict(model, optimizer)
    saved = {"optimizer": {"state": own["state"]}}
    try:
        checkpoint.load(saved, storage_reader=Reader(folder))
    except checkpoint.CheckpointException as error:  # no Exception
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    set_optimizer_state_dict(model, optimizer, own | saved["optimizer"])
