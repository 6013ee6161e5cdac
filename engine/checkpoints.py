"""Checkpoints: an ordinary model folder, optimizer, schedule and ledger, sealed by a list of digests that is written last."""

import json
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from . import lora, ranks
from .errors import BadArgument, RunError, printable
from .files import digest, lock, read_record, remove, sync, writing
from .flags import LATEST
from .models import eos_ids


def save_model(folder, model, tokenizer, merge=True):
    """Save an ordinary HF model folder. Files appear one by one, each complete, the weights last. Rank 0 writes.

    merge=False: of a model with an adapter, save the adapter alone, as a folder of peft.
    """
    merge = merge or not lora.layers(model)
    weights, beside = ranks.full_state_dict(model, trained_only=not merge), Path(folder) / ".model.tmp"
    if ranks.rank():
        return
    lora.report_idle(model, weights)
    with writing(folder, beside):
        write_model(beside, model, tokenizer, weights, merge)
        sync(*beside.rglob("*"))
        for entry in sorted(beside.iterdir(), key=lambda entry: entry.suffix == ".safetensors"):
            if entry.is_dir():  # adapter/: a rename does not replace a folder
                remove(Path(folder) / entry.name)
            os.replace(entry, Path(folder) / entry.name)
        other = lora.FILES if merge else ("model.safetensors", "config.json", "generation_config.json", "adapter")
        for name in other if lora.layers(model) else ():  # of a run that was resumed with the other --save_merged
            remove(Path(folder) / name)
        beside.rmdir()
        sync(folder)


def write_model(folder, model, tokenizer, weights, merge=True):
    """Write the files of a model folder, with the given whole state dict. A model with an adapter is merged; adapter/ has the adapter.

    merge=False: only adapter and tokenizer are written, and `weights` holds no others. generation_config.json is the model's own, with
    every EOS id at which completions ended. The file is edited, because transformers refuses to save a changed config that contradicts
    itself, and published ones do (tests/test_cli.py).
    """
    broken = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise RunError(f"{folder.parent}: nothing is saved, because {broken} is not finite")
    if lora.layers(model):
        lora.save_adapter(folder / "adapter" if merge else folder, model, weights)
        if not merge:
            tokenizer.save_pretrained(folder)
            return
        weights = lora.merged(model, weights)
    weights |= {name: weights[source] for name, source in model.all_tied_weights_keys.items() if source in weights}  # copies, if gathered
    model.save_pretrained(folder, state_dict=weights, max_shard_size=2**62)  # one file, which is sealed and loaded as one
    generation_config = folder / "generation_config.json"
    generation_config.write_text(json.dumps(
        json.loads(generation_config.read_text()) | {"eos_token_id": eos_ids(model, tokenizer)}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def save_checkpoint(run_dir, step, model, tokenizer, optimizer, flops, total_limit):
    """Write checkpoint-<step>: model, or only its adapter, optimizer, ledger. Remove the oldest checkpoints over `total_limit`.

    The folder is written beside and renamed. No random state and no schedule is stored: both are functions of seed, step and flags. Rank 0
    writes. For a sharded model each rank also writes its slices of the optimizer's state into optimizer/, which any number of ranks
    can read.
    """
    beside, final = run_dir / f".checkpoint-{step}.tmp", run_dir / f"checkpoint-{step}"
    weights = ranks.full_state_dict(model, trained_only=bool(lora.layers(model)))
    whole = [] if ranks.rank() else complete_checkpoints(run_dir)
    with writing(final, beside, hint=f"; {whole[-1]} is complete" if whole else ""):
        if ranks.is_sharded(model):
            ranks.save_optimizer(beside / "optimizer", model, optimizer)
        if ranks.rank():
            return
        write_model(beside, model, tokenizer, weights, merge=False)
        with open(beside / "optimizer.pt", "wb") as file:
            torch.save({} if ranks.is_sharded(model) else {"optimizer": optimizer.state_dict()}, file)
        seal(beside, {"step": step, "num_tokens": flops.num_tokens, "flops": flops.spent})
        sync(*run_dir.glob("metrics.jsonl"))  # its lines must not be younger than the checkpoint
        remove(final)  # a torn one
        os.replace(beside, final)
        sync(run_dir)
    for old in complete_checkpoints(run_dir)[:-total_limit]:
        remove(old)


def seal(folder, state):
    """Write state.json last, with `state` and the digests of all other files; then force the folder to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {file.relative_to(folder).as_posix(): digest(file) for file in files}
    (folder / "state.json").write_text(json.dumps(state | {"files": named}))
    sync(*files, folder / "state.json", *{file.parent for file in files}, folder)


def read_state(checkpoint):
    """Read state.json of a checkpoint. Raises BadArgument when a file of the checkpoint is missing, cut or changed."""
    kind = {"step": "a whole number", "num_tokens": "a number", "flops": {str: "a number"}, "files": {str: {}}}
    state = read_record(checkpoint / "state.json", kind)
    if checkpoint.name != f"checkpoint-{state['step']}":
        raise BadArgument(f"state.json is of step {state['step']}")
    present = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    for name in {"optimizer.pt", lora.WEIGHTS if lora.WEIGHTS in state["files"] else "model.safetensors"} | state["files"].keys():
        if name not in present:
            raise BadArgument(f"{name} is missing")
        if digest(present[name]) != state["files"].get(name):
            raise BadArgument(f"{name} is not as it was written")
    return state


def checkpoints(run_dir):
    """The checkpoint-N folders of a run, complete or not, oldest first."""
    found = [path for path in Path(run_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def torn(checkpoint):
    """Say what is wrong with a checkpoint, in a few words; None when the checkpoint is complete."""
    try:
        read_state(checkpoint)
    except BadArgument as error:
        return str(error)
    return None


def complete_checkpoints(run_dir):
    """The complete checkpoint-N folders of a run, oldest first."""
    return [checkpoint for checkpoint in checkpoints(run_dir) if torn(checkpoint) is None]


def find_checkpoint(given, output_dir, script):
    """Resolve --resume_from_checkpoint: returns (run folder, checkpoint, saved flags), and locks the folder.

    given: a checkpoint folder; a run folder, which means its latest complete checkpoint; or LATEST, the latest one in --output_dir. Torn
    checkpoints are skipped with a printed line. The checkpoint is None when LATEST finds a run that was stopped before its first
    checkpoint, or no run at all (the flags are {} then): the same command starts a run and goes on with it.
    """
    flag, path = "--resume_from_checkpoint", Path((output_dir or "") if given == LATEST else given)
    if given == LATEST and output_dir is None:
        raise BadArgument(f"{flag}: name the run folder, or give --output_dir")
    named = bool(re.fullmatch(r"checkpoint-\d+", path.name)) and not (path / "args.json").exists()
    run_dir = path.parent if named else path
    if given != LATEST and output_dir is not None and Path(output_dir).resolve() != run_dir.resolve():
        raise BadArgument(f"--output_dir {output_dir}: {flag} {given} goes on in {run_dir}: leave --output_dir out")
    if given == LATEST and (not path.exists() or path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())):
        return run_dir, None, {}
    if not path.is_dir():
        raise BadArgument(f"{flag}: no checkpoint in {path}")
    if not (run_dir / "args.json").is_file():
        raise BadArgument(f"{flag}: {run_dir} has no args.json, so it is not a run folder")
    record = read_record(run_dir / "args.json", {"script": "a text", "args": {}})
    if record["script"] != script:
        raise BadArgument(f"{flag}: {path} is a run of {record['script']}")
    lock(run_dir)
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = torn(checkpoint)
        if wrong and checkpoint == path:
            raise BadArgument(f"{flag} {path} is torn: {wrong}")
        if not wrong and named and checkpoint != path:
            raise BadArgument(f"{flag} {path}: the run has later checkpoints, up to {checkpoint}: remove them first")
        if not wrong:
            return run_dir, checkpoint, record["args"]
        print(f"skipping {checkpoint}, which is torn: {printable(wrong)}")
    if checkpoints(run_dir):
        raise BadArgument(f"{flag}: no checkpoint in {run_dir} is complete")
    if any(run_dir.glob("*.safetensors")):
        raise BadArgument(f"{flag}: {run_dir} is finished and has no checkpoint to go on from")
    if given != LATEST:
        raise BadArgument(f"{flag}: no checkpoint in {run_dir} yet; to start it again: --output_dir {run_dir} {flag}")
    return run_dir, None, record["args"]


def load_checkpoint(checkpoint, model, optimizer, scheduler, flops):
    """Load weights, moments and ledger in place, and go to their step in the schedule; returns it, 0 for None and for LATEST.

    Rate, decay and schedule are those of the flags, so flags that a resumed run changes act from its first step on. Raises BadArgument
    when a file holds something else. No code in a file runs: only safetensors, tensors and plain values are read.
    """
    if checkpoint in (None, LATEST):
        return 0
    for flag, part, given in (("--parallel fsdp", "optimizer", ranks.is_sharded(model)), ("--lora_rank", lora.WEIGHTS, lora.layers(model))):
        if (Path(checkpoint) / part).exists() != bool(given):
            written = "without" if given else "with"
            raise BadArgument(f"--resume_from_checkpoint {checkpoint} was written {written} {flag}: give the same")
    try:
        if lora.layers(model):
            lora.load_adapter(model, Path(checkpoint) / lora.WEIGHTS, model.base_digest)
        else:
            ranks.load_weights(model, Path(checkpoint) / "model.safetensors")
        state = torch.load(Path(checkpoint) / "optimizer.pt", weights_only=True, map_location=model.device)
        if ranks.is_sharded(model):
            ranks.load_optimizer(Path(checkpoint) / "optimizer", model, optimizer)
        else:
            optimizer.load_state_dict(state["optimizer"] | {"param_groups": optimizer.state_dict()["param_groups"]})
        check_moments(model, optimizer)
        progress = read_state(Path(checkpoint))
    except pickle.UnpicklingError as error:
        raise BadArgument(f"--resume_from_checkpoint {checkpoint}: optimizer.pt is refused: it is no file of plain tensors") from error
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "loading state_dict" in reason:
            reason = "its weights are those of another model than --model_name_or_path"
        raise BadArgument(f"--resume_from_checkpoint {checkpoint} does not fit: {reason}") from error
    for group, rate, share in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = rate * share(progress["step"])
    scheduler.last_epoch, scheduler._last_lr = progress["step"], [group["lr"] for group in optimizer.param_groups]
    flops.spent.update(progress["flops"])
    flops.num_tokens = progress["num_tokens"]
    return progress["step"]


def check_moments(model, optimizer):
    """Raise ValueError when a weight or a moment of the optimizer is not finite, or a moment has another shape than its weight."""
    for name, weight in model.named_parameters():
        for what, value in {"weight": weight.detach(), **optimizer.state.get(weight, {})}.items():
            whole = ranks.full_tensor(torch.as_tensor(value))
            if what not in ("weight", "step") and whole.shape != weight.shape:
                raise ValueError(f"{what} of {name} has the shape {tuple(whole.shape)}, not {tuple(weight.shape)}")
            if not torch.isfinite(whole).all():
                raise ValueError(f"{what} of {name} is not finite")
