"""The passes that turn a float graph into the integer graph of a dialect, in the order in which they run."""

from pcr_export.graph.job import Pass
from pcr_export.graph.passes.absorb_upsampling import AbsorbUpsampling
from pcr_export.graph.passes.branch_on_relaxed import BranchOnRelaxed
from pcr_export.graph.passes.channels_last import ChannelsLast
from pcr_export.graph.passes.choose_planes import ChoosePlanes
from pcr_export.graph.passes.expand_group_norm import ExpandGroupNorm
from pcr_export.graph.passes.find_layers import FindLayers
from pcr_export.graph.passes.find_step import FindStep
from pcr_export.graph.passes.flatten_attention import FlattenAttention
from pcr_export.graph.passes.fuse_silu import FuseSilu
from pcr_export.graph.passes.gather_qdq_scales import GatherQdqScales
from pcr_export.graph.passes.gather_scales import GatherScales
from pcr_export.graph.passes.group_norm import LowerGroupNorm
from pcr_export.graph.passes.lower_layers import LowerLayers
from pcr_export.graph.passes.lower_to_qdq import LowerToQdq
from pcr_export.graph.passes.sink_concat import SinkConcat
from pcr_export.graph.passes.split_gated import SplitGated
from pcr_export.graph.passes.tidy import Tidy
from pcr_export.graph.passes.to_half import ToHalf

ONNXRUNTIME_PASSES: tuple[type[Pass], ...] = (
    FindLayers,  # which nodes are quantized layers
    FuseSilu,
    ChannelsLast,  # pictures as [batch, height, width, channels]
    FlattenAttention,
    SplitGated,
    AbsorbUpsampling,
    LowerGroupNorm,
    SinkConcat,
    FindStep,
    GatherScales,
    BranchOnRelaxed,  # two forms where some step is relaxed
    LowerLayers,  # integers
    Tidy,
)

TENSORRT_PASSES: tuple[type[Pass], ...] = (
    FindLayers,
    ToHalf,
    ExpandGroupNorm,
    FindStep,
    ChoosePlanes,  # one or two digits per activation, where some step is relaxed
    GatherQdqScales,
    LowerToQdq,
    Tidy,
)

HALF_PASSES: tuple[type[Pass], ...] = (ToHalf, Tidy)

DIALECTS = {"onnxruntime": ONNXRUNTIME_PASSES, "tensorrt": TENSORRT_PASSES}
