"""What a U-Net is built from, read from a checkpoint's `unet/config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdfast.errors import CheckpointError
from sdfast.models.fields import Fields

# Options of diffusers' UNet2DConditionModel of which one value is supported.
FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}
# `use_linear_projection` says how the checkpoint stores a matrix; the weights' shapes say it too.
IGNORED = {"sample_size", "dropout", "addition_embed_type_num_heads", "use_linear_projection"}


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net, on its way down or up."""

    channels: int
    resnets: int
    depths: tuple[int, ...]  # transformer blocks after each ResNet block; empty: no attention
    heads: int


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int
    out_channels: int
    down: tuple[Level, ...]
    mid: Level | None
    up: tuple[Level, ...]
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float
    upcast_attention: bool
    flip_sin_to_cos: bool
    freq_shift: float
    time_embed_dim: int
    time_cond_proj_dim: int | None  # LCM: width of the guidance embedding
    addition_time_embed_dim: int | None  # SDXL: width of each told number's embedding
    addition_input_dim: int | None  # SDXL: pooled text embedding and those numbers' together

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], component: str = "unet") -> "UNetConfig":
        """The content of a checkpoint's `unet/config.json`; CheckpointError names what is not supported.

        component: whose config it is, for the message.
        """
        fields = Fields(component, config)
        fields.require(FIXED, IGNORED)
        fields.choose("act_fn", ("silu", "swish"), "silu")
        sizes, pooled = _addition(fields)
        down, mid, up = _levels(fields)
        return cls(
            in_channels=fields.integer("in_channels", 4),
            out_channels=fields.integer("out_channels", 4),
            down=down,
            mid=mid,
            up=up,
            cross_attention_dim=_cross_attention_dim(fields),
            norm_num_groups=fields.integer("norm_num_groups", 32),
            norm_eps=fields.number("norm_eps", 1e-5),
            upcast_attention=fields.flag("upcast_attention", False),
            flip_sin_to_cos=fields.flag("flip_sin_to_cos", True),
            freq_shift=fields.number("freq_shift", 0),
            time_embed_dim=fields.optional_integer("time_embedding_dim") or 4 * down[0].channels,
            time_cond_proj_dim=fields.optional_integer("time_cond_proj_dim"),
            addition_time_embed_dim=sizes,
            addition_input_dim=pooled,
        )._checked(fields)

    def _checked(self, fields: Fields) -> "UNetConfig":
        fields.finish()
        for level in (*self.down, *self.up):
            if level.channels % self.norm_num_groups or (level.depths and level.channels % level.heads):
                raise CheckpointError(
                    f"{fields.component}/config.json: {level.channels} channels do not divide into "
                    f"{self.norm_num_groups} norm groups and {level.heads} attention heads"
                )
        return self

    @property
    def size_factor(self) -> int:
        """Latent heights and widths that are multiples of this need no rounding on the way down."""
        return int(2 ** (len(self.down) - 1))

    def pooled_dim(self, time_ids: int = 6) -> int | None:
        """SDXL: width of the pooled text embedding that TimeShift takes beside so many numbers."""
        if self.addition_input_dim is None or self.addition_time_embed_dim is None:
            return None
        return self.addition_input_dim - time_ids * self.addition_time_embed_dim


def _addition(fields: Fields) -> tuple[int | None, int | None]:
    """SDXL's `text_time` addition to the timestep: width of one size's embedding, and of all its inputs."""
    if fields.choose("addition_embed_type", (None, "text_time"), None) is None:
        fields.require(
            {"addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}, set()
        )
        return None, None
    return (
        fields.integer("addition_time_embed_dim", None),
        fields.integer("projection_class_embeddings_input_dim", None),
    )


def _cross_attention_dim(fields: Fields) -> int:
    dims = set(fields.integers("cross_attention_dim", 1280))
    if len(dims) != 1:
        raise CheckpointError(
            f"{fields.component}/config.json: cross_attention_dim {sorted(dims)}: the levels must share one"
        )
    return dims.pop()


def _depths(block: str, depth: Any, resnets: int, component: str) -> tuple[int, ...]:
    """Transformer blocks after each ResNet block: `depth` is one number, or a list with one for each."""
    if not block.startswith("CrossAttn"):
        return ()
    depths = tuple(depth) if isinstance(depth, (list, tuple)) else (depth,) * resnets
    if len(depths) < resnets:
        raise CheckpointError(
            f"{component}/config.json: transformer_layers_per_block {depth!r} for {resnets} ResNet blocks"
        )
    return tuple(int(d) for d in depths[:resnets])


def _levels(fields: Fields) -> tuple[tuple[Level, ...], Level | None, tuple[Level, ...]]:
    """The levels on the way down, in the middle, and on the way up, in the order in which they run."""
    down_types = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_types = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    down = fields.blocks("down_block_types", down_types, ("CrossAttnDownBlock2D", "DownBlock2D"))
    fields.levels = len(down)
    up = fields.blocks("up_block_types", up_types, ("CrossAttnUpBlock2D", "UpBlock2D"))
    mid = fields.choose(
        "mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None), "UNetMidBlock2DCrossAttn"
    )
    channels = fields.integers("block_out_channels", (320, 640, 1280, 1280))
    resnets = fields.integers("layers_per_block", 2)
    # diffusers' configs call the number of heads `attention_head_dim`: a misnomer it keeps for compatibility.
    given = fields.take("num_attention_heads", None)
    heads = fields.integers("attention_head_dim" if given is None else "num_attention_heads", 8)
    fields.take("attention_head_dim", None)
    depth = fields.per_level("transformer_layers_per_block", 1)
    up_depth = fields.per_level("reverse_transformer_layers_per_block", None)
    up_depth = depth[::-1] if up_depth[0] is None else up_depth
    forth = zip(down, channels, resnets, depth, heads, strict=True)
    back = zip(up, channels[::-1], resnets[::-1], up_depth, heads[::-1], strict=True)
    whose = fields.component
    downs = tuple(Level(c, n, _depths(t, d, n, whose), h) for t, c, n, d, h in forth)
    ups = tuple(Level(c, n + 1, _depths(t, d, n + 1, whose), h) for t, c, n, d, h in back)
    if mid is None:
        return downs, None, ups
    mid_depths = _depths("CrossAttn", depth[-1], 1, whose) if mid == "UNetMidBlock2DCrossAttn" else ()
    return downs, Level(channels[-1], 2 if mid_depths else 1, mid_depths, heads[-1]), ups


def controlnet_names(count: int) -> list[str]:
    """What the ControlNets beside a U-Net are called: "controlnet", "controlnet_2" and so on."""
    return ["controlnet", *(f"controlnet_{number}" for number in range(2, count + 1))][:count]


def adapter_names(count: int) -> list[str]:
    """What IP-Adapters are called, and their modules: "image_context", "image_context_2" and so on."""
    return ["image_context", *(f"image_context_{number}" for number in range(2, count + 1))][:count]
