"""Token compressors, one file per method."""

from omnisieve.compressors import (  # noqa: F401  registers the methods
    dash,
    divprune,
    dycoke,
    fastv,
    fastvid,
    full,
    omnidrop,
    omnisift,
    omnizip,
    random,
    seats,
    stvp,
    visionzip,
    windivprune,
)
from omnisieve.compressors.base import (
    Budget,
    Compressor,
    CompressorError,
    Need,
    Settings,
    UnreachableRatioError,
    build_compressor,
    compressor_type,
    find_preset,
    list_compressors,
    list_presets,
    register,
)

__all__ = [
    "Budget",
    "Compressor",
    "CompressorError",
    "Need",
    "Settings",
    "UnreachableRatioError",
    "build_compressor",
    "compressor_type",
    "find_preset",
    "list_compressors",
    "list_presets",
    "register",
]
