"""Whether a run may go on from a checkpoint: what differs from the run that wrote it, and what of that is allowed."""

from collections.abc import Sequence
from typing import Any

from diffusion_unet.arguments import suggest
from diffusion_unet.errors import InputError

from .checkpoint import Checkpoint
from .config import Config, DataConfig, changed, settings, to_dict
from .settings import show
from .start import BASE

Change = dict[str, Any]  # as state.json keeps it: the step it came after, the setting, from, to


def check_allowed(allowed: Sequence[str]) -> None:
    """Raises InputError for what `--allow-change` cannot allow."""
    known = {item.key for item in settings() if item.type and item.fixed} | {"data.train_data_dir", "data.dataset_name"}
    for key in allowed:
        if key.startswith("model."):
            raise InputError(f"--allow-change {key}: another model is another run: take another train.output_dir")
        if key not in known:
            raise InputError(f"--allow-change {key}: no setting that a run holds on to{suggest(key, known)}")


def changes_of(found: Checkpoint, config: Config, allowed: Sequence[str] = ()) -> list[Change]:
    """The settings that differ from those of the checkpoint. Raises InputError, naming those that are not allowed."""
    differing = changed(found.state.get("config", {}), to_dict(config))
    refused = [_line(*change) for change in differing if change[0] not in allowed]
    if found.state["step"] > config.train.max_train_steps:
        refused.append(f"train.max_train_steps: {config.train.max_train_steps}, for it has taken more")
    if refused:
        raise InputError(
            f"{found.path}: it cannot go on with {'; '.join(refused)}: change it back, or take another train.output_dir"
        )
    step = found.state["step"]
    return [{"step": step, "setting": key, "from": old, "to": new} for key, old, new in differing]


def changes_of_data(
    found: Checkpoint, data: DataConfig, fingerprint: str | None, allowed: Sequence[str] = ()
) -> list[Change]:
    """As `changes_of`, of the images and captions themselves; `fingerprint` is that of those at hand."""
    before, key = found.state.get("data"), "data.train_data_dir" if data.train_data_dir else "data.dataset_name"
    if before == fingerprint:
        return []
    if key not in allowed:
        raise InputError(
            f"{found.path}: {key}: images or captions are not those that the run began with: put them back, take"
            f" another train.output_dir, or go on with these (--allow-change {key})"
        )
    return [{"step": found.state["step"], "setting": key, "from": before, "to": fingerprint}]


def refuse_other_model(found: Checkpoint, config: Config, fingerprint: str) -> None:
    """Raises InputError unless the model as it was before the first step has this fingerprint."""
    if found.state.get("model") != fingerprint:
        model = config.model.pretrained
        named = f"model.pretrained: {model}" if model else f"{found.path.parent / BASE}"
        raise InputError(
            f"{found.path}: {named} is not the model that the run began with: put it back, or take another"
            " train.output_dir"
        )


def tell(changes: Sequence[Change]) -> list[str]:
    """What a person is told of changes that were allowed."""
    return [f"goes on with {_line(one['setting'], one['from'], one['to'])}, as allowed" for one in changes]


def _line(key: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):  # a free mapping: what of it differs
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return "; ".join(_line(f"{key}.{name}", old.get(name), new.get(name)) for name in names)
    return f"{key}: {show(old)} -> {show(new)}"
