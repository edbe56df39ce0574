"""The architecture of a U-Net as one frozen, validated record, read from and written to diffusers' `config.json`.

Field names are diffusers', so that a configuration can be compared with its file line by line, with one exception:
what those files call `attention_head_dim` is the number of heads, and is called `num_attention_heads` here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from .errors import InputError

Check = Callable[[Any], bool]

PREFIX = "U-Net configuration: "
# What a file from a stranger may ask for: no network known comes near, and one within them is built at once.
MAX_SIZE, MAX_PIXELS, MAX_KERNEL, MAX_LAYERS, MAX_LEVELS, MAX_BLOCKS = 1 << 20, 1 << 14, 63, 256, 16, 2048
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # name: has it attention?
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {None: False, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}

# Fields of diffusers' class that no Stable Diffusion block reads, with the values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "dual_cross_attention": (False, None),
    "resnet_skip_time_act": (False, None),
    "resnet_out_scale_factor": (1, None),
    "time_embedding_type": ("positional", None),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "attention_type": ("default", None),
    "mid_block_only_cross_attention": (False, None),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64, None),
}


def _whole(most: int = MAX_SIZE, step: int = 1) -> Check:
    """A whole number above 0, at most `most`; an odd one where `step` is 2."""
    return lambda value: type(value) is int and 0 < value <= most and value % step == 1 % step


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _bit(value: Any) -> bool:
    return type(value) in (int, float) and value in (0, 1)


def _fraction(value: Any) -> bool:
    return (_bit(value) or _above_zero(value)) and value < 1


def _each(holds: Check, depth: int = 1) -> Check:
    """The check of one value, or of every entry of a non-empty tuple, of which `depth` may be one in the other."""
    inner = _each(holds, depth - 1) if depth else lambda value: False
    return lambda value: bool(value) and all(map(inner, value)) if isinstance(value, tuple) else holds(value)


def _tuple(holds: Check, most: int = MAX_LEVELS) -> Check:
    return lambda value: isinstance(value, tuple) and len(value) <= most and _each(holds)(value)


def _sides(value: Any) -> bool:
    return _whole(MAX_PIXELS)(value) or (_tuple(_whole(MAX_PIXELS))(value) and len(value) == 2)


def _field(default: Any, wanted: str, holds: Check, *, per_level: bool = False) -> Any:
    """A field with its check, and what to say when it fails; None is let through where it is the default."""
    null = " or null" if default is None else ""
    return field(
        default=default,
        metadata={
            "wanted": wanted + null,
            "holds": lambda value: (default is None and value is None) or holds(value),
            "per_level": per_level,
        },
    )


def _integer(default: int | None) -> Any:
    return _field(default, f"a whole number above 0, at most {MAX_SIZE}", _whole())


def _flag(default: bool) -> Any:
    return _field(default, "true or false", _boolean)


def _one_of(default: str | None, *names: str | None) -> Any:
    return _field(default, "one of " + ", ".join(name or "null" for name in names), lambda value: value in names)


def _integers(default: int | None, *, nullable: bool = False, most: int = MAX_SIZE, depth: int = 1) -> Any:
    wanted = f"a whole number above 0, at most {most}{', null,' * nullable} or a list with one for each level"
    check = _each(lambda value: (nullable and value is None) or _whole(most)(value), depth)
    return _field(default, wanted, check, per_level=True)


def _names(default: tuple[str, ...], names: Mapping[str, bool]) -> Any:
    return _field(default, "a list of " + ", ".join(names), _tuple(lambda value: value in (*names,)), per_level=True)


class Level(NamedTuple):
    """One resolution of the U-Net, on one of its two sides."""

    channels: int
    depths: tuple[int, ...]  # transformer blocks behind each residual block; 0 where the level has no attention
    heads: int
    context_dim: int | None  # width of the text context; None: self-attention only
    only_cross_attention: bool
    resample: bool  # ends with a down- or upsampling


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A conditional U-Net of the Stable Diffusion family.

    A field that may differ between levels takes one value for all, or one for each level from the largest image
    down. Everything is checked at construction; all offending fields are named in one `InputError`.
    """

    # Height and width that the weights were trained for, in x's own pixels.
    sample_size: int | tuple[int, int] | None = _field(None, f"1 to {MAX_PIXELS}, or a pair of such", _sides)
    in_channels: int = _integer(4)
    out_channels: int = _integer(4)
    center_input_sample: bool = _flag(False)  # map x from [0, 1] to [-1, 1] first
    flip_sin_to_cos: bool = _flag(True)  # cosines before sines in the sinusoidal embedding
    freq_shift: float = _field(0, "0 or 1", _bit)
    down_block_types: tuple[str, ...] = _names(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), DOWN_BLOCKS)
    mid_block_type: str | None = _one_of("UNetMidBlock2DCrossAttn", *MID_BLOCKS)
    up_block_types: tuple[str, ...] = _names(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, UP_BLOCKS)
    # The first attention of each transformer block attends to the text, too.
    only_cross_attention: bool | tuple[bool, ...] = _field(False, "true or false", _each(_boolean), per_level=True)
    block_out_channels: tuple[int, ...] = _field((320, 640, 1280, 1280), "a list of 1 to 16 widths", _tuple(_whole()))
    # Residual blocks a level going down; one more going up.
    layers_per_block: int | tuple[int, ...] = _integers(2, most=MAX_LAYERS)
    downsample_padding: int = _field(1, "0 or 1", _bit)  # 0: zeros at the far edges only
    mid_block_scale_factor: float = _field(1, "a number above 0", _above_zero)  # divides the middle's outputs
    dropout: float = _field(0.0, "a number from 0 to below 1", _fraction)
    act_fn: str = _one_of("silu", "silu", "swish")
    norm_num_groups: int = _integer(32)
    norm_eps: float = _field(1e-5, "a number above 0", _above_zero)
    cross_attention_dim: int | tuple[int | None, ...] | None = _integers(1280, nullable=True)
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = _integers(1, most=MAX_LAYERS, depth=2)
    # Null: the same going up as going down.
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = _integers(
        None, most=MAX_LAYERS, depth=2
    )
    encoder_hid_dim: int | None = _integer(None)  # width of the context before `encoder_hid_proj`
    encoder_hid_dim_type: str | None = _one_of(None, "text_proj")
    num_attention_heads: int | tuple[int, ...] = _integers(8)
    use_linear_projection: bool = _flag(False)  # linear instead of 1x1 convolution around the transformer blocks
    class_embed_type: str | None = _one_of(None, "timestep", "identity", "projection", "simple_projection")
    addition_embed_type: str | None = _one_of(None, "text_time")  # SDXL's pooled text and six sizes
    addition_time_embed_dim: int | None = _integer(None)
    num_class_embeds: int | None = _integer(None)
    upcast_attention: bool = _flag(False)  # holds by construction: torch's fused attention accumulates in float32
    resnet_time_scale_shift: str = _one_of("default", "default", "scale_shift")  # h + shift; h * (1 + scale) + shift
    time_embedding_dim: int | None = _integer(None)  # null: four times the first width
    time_cond_proj_dim: int | None = _integer(None)  # width of the guidance embedding of distilled models (LCM)
    conv_in_kernel: int = _field(3, f"an odd whole number, at most {MAX_KERNEL}", _whole(MAX_KERNEL, 2))
    conv_out_kernel: int = _field(3, f"an odd whole number, at most {MAX_KERNEL}", _whole(MAX_KERNEL, 2))
    projection_class_embeddings_input_dim: int | None = _integer(None)
    class_embeddings_concat: bool = _flag(False)

    def __post_init__(self) -> None:
        for spec in fields(self):  # JSON and YAML hold lists
            object.__setattr__(self, spec.name, _frozen(getattr(self, spec.name)))
        _refuse(self._problems())

    # --- derived -----------------------------------------------------------------------------------------------

    @property
    def time_embed_dim(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def block_embed_dim(self) -> int:
        """Width of the embedding that the residual blocks read."""
        return self.time_embed_dim * (2 if self.class_embeddings_concat else 1)

    @property
    def down_levels(self) -> tuple[Level, ...]:
        depths, last = self._spread(self.transformer_layers_per_block), len(self.block_out_channels) - 1
        return tuple(
            self._level(i, self._spread(self.layers_per_block)[i], DOWN_BLOCKS[name], depths[i], i != last)
            for i, name in enumerate(self.down_block_types)
        )

    @property
    def mid_level(self) -> Level:
        depth, attention = self._spread(self.transformer_layers_per_block)[-1], MID_BLOCKS[self.mid_block_type]
        return self._level(-1, int(attention), attention, depth, False)._replace(only_cross_attention=False)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        depths = self.reverse_transformer_layers_per_block or self._spread(self.transformer_layers_per_block)[::-1]
        return tuple(
            self._level(i, self._spread(self.layers_per_block)[i] + 1, UP_BLOCKS[name], depth, i != 0)
            for i, name, depth in zip(range(len(depths))[::-1], self.up_block_types, depths, strict=True)
        )

    def _level(self, i: int, layers: int, attention: bool, depth: int | tuple[int, ...], resample: bool) -> Level:
        depths = depth[:layers] if isinstance(depth, tuple) else (depth,) * layers
        return Level(
            self.block_out_channels[i],
            depths if attention else (0,) * layers,
            self._spread(self.num_attention_heads)[i],
            self._spread(self.cross_attention_dim)[i],
            self._spread(self.only_cross_attention)[i],
            resample,
        )

    def _spread(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    # --- checks ------------------------------------------------------------------------------------------------

    def _problems(self) -> list[str]:
        widths, problems = self.block_out_channels, []
        count = len(widths) if isinstance(widths, tuple) else 0
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not spec.metadata["holds"](value):
                problems.append(f"{spec.name} is {ascii(_listed(value))[:80]}, and must be {spec.metadata['wanted']}")
            elif count and spec.metadata["per_level"] and isinstance(value, tuple) and len(value) != count:
                problems.append(f"{spec.name} has {len(value)} entries for {count} levels (block_out_channels)")
        return problems or self._dependent_problems()

    def _dependent_problems(self) -> list[str]:
        nested = any(isinstance(depth, tuple) for depth in self._spread(self.transformer_layers_per_block))
        projects = self.class_embed_type in ("projection", "simple_projection") or self.addition_embed_type
        classes = self.num_class_embeds or self.class_embed_type
        needs = {
            "reverse_transformer_layers_per_block": nested and not self.reverse_transformer_layers_per_block,
            "num_class_embeds or class_embed_type": self.class_embeddings_concat and not classes,
            "encoder_hid_dim": self.encoder_hid_dim_type and not self.encoder_hid_dim,
            "projection_class_embeddings_input_dim": projects and not self.projection_class_embeddings_input_dim,
            "addition_time_embed_dim": self.addition_embed_type and not self.addition_time_embed_dim,
            "one cross_attention_dim for all levels": self.encoder_hid_dim
            and isinstance(self.cross_attention_dim, tuple),
        }
        problems = [f"{name} is needed here" for name, needed in needs.items() if needed]
        layers = self._spread(self.layers_per_block)
        wanted, levels = (*layers, *(n + 1 for n in layers[::-1])), (*self.down_levels, *self.up_levels)
        for level, n in zip(levels, wanted, strict=True):
            if level.channels % self.norm_num_groups:
                problems.append(f"norm_num_groups {self.norm_num_groups} does not divide the width {level.channels}")
            if len(level.depths) < n:
                problems.append(f"a level of {n} layers has transformer depths for {len(level.depths)} only")
            if any(level.depths) and level.context_dim is None:
                problems.append("cross_attention_dim is null where a block with cross-attention needs it")
            if any(level.depths) and level.channels % level.heads:
                problems.append(f"{level.heads} attention heads (attention_head_dim) do not divide {level.channels}")
        if (blocks := sum(len(level.depths) + sum(level.depths) for level in levels)) > MAX_BLOCKS:
            problems.append(f"layers_per_block and transformer_layers_per_block make {blocks}, over {MAX_BLOCKS}")
        return list(dict.fromkeys(problems))

    # --- diffusers' spelling -----------------------------------------------------------------------------------

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, ignore_unknown: bool = False) -> "UNetConfig":
        """Read the mapping of a diffusers `unet/config.json`.

        Configurations of 2022 lack keys and hold nulls where a later version has a default: both mean the default.
        `ignore_unknown` lets keys pass that are none of diffusers' (files in circulation carry those of an EMA);
        without it they are errors, as a misspelt key in a person's own configuration should be.

        Raises:
            InputError: naming every field that this network does not support, with its value.
        """
        known = {spec.name: spec for spec in fields(cls)}
        given = {key: value for key, value in values.items() if not str(key).startswith("_")}
        problems = []
        if given.pop("num_attention_heads", None) is not None:
            problems.append("num_attention_heads is set (diffusers calls the number of heads attention_head_dim)")
        if "attention_head_dim" in given:
            given["num_attention_heads"] = given.pop("attention_head_dim")
        for key, neutral in UNUSED.items():
            if key in given and (value := given.pop(key)) not in neutral:
                problems.append(f"{key} is {ascii(value)[:80]}, and only {neutral[0]!r} is supported")
        if given.get("encoder_hid_dim") is not None and given.get("encoder_hid_dim_type") is None:
            given["encoder_hid_dim_type"] = "text_proj"
        if not ignore_unknown:
            unknown = sorted(ascii(str(key))[1:-1][:60] for key in given.keys() - known)
            problems += [f"{key} is not a field of a U-Net" for key in unknown]
        kept = {k: v for k, v in given.items() if k in known and (v is not None or known[k].metadata["holds"](None))}
        try:
            config = cls(**kept)
        except InputError as error:
            problems.append(str(error).removeprefix(PREFIX))
        _refuse(problems)
        return config

    def to_diffusers(self) -> dict[str, Any]:
        """The mapping that diffusers' `UNet2DConditionModel.from_config` takes: plain JSON values, all fields."""
        values = {spec.name: _listed(getattr(self, spec.name)) for spec in fields(self)}
        values["attention_head_dim"] = values.pop("num_attention_heads")
        if self.cross_attention_dim is None:  # diffusers spreads only integers over the levels
            values["cross_attention_dim"] = [None] * len(self.block_out_channels)
        return {"_class_name": "UNet2DConditionModel", **values}


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError(PREFIX + "; ".join(problems))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
