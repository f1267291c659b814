"""The data of `tiles`: chosen resources of every kernel, mode and shape, and what compiling said of them.

Figures come from `inspect.py` for G = 1, quarter rotation, all of Z, D and MIMO_Out, no norm and no documents, PsiV
computed; `make test-kernels` compiles all of it again.
"""
# N state  P head width  R rank  C tokens of a chunk

from __future__ import annotations

from typing import Literal, NamedTuple

from libs.kernels.mimo.sm90.gates import Mode

Kernel = Literal["fwd", "states", "bwd_fwd", "bwd_states", "bwd_bwd"]


class TileShape(NamedTuple):
    """What decides the size of tiles."""

    N: int
    P: int
    R: int
    C: int


class Tiles(NamedTuple):
    """Chosen: pipeline stages, resident blocks asked for, shared x tile. Measured: shared bytes a block, registers a
    thread without any ceiling, resident blocks a multiprocessor. Chosen again: threads that compute; a producer group
    has 128 more. Measured: bytes of spills, stores plus loads; more than that is refused by the tests."""

    stages: int
    min_blocks: int
    share_x: bool
    shared: int
    needed: int
    blocks: int
    threads: int = 128
    spills: int = 0


TABLE: dict[tuple[Kernel, Mode], dict[TileShape, Tiles]] = {
    ("fwd", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(2, 2, False, 39488, 126, 2),
        TileShape(32, 64, 4, 16): Tiles(2, 2, False, 83968, 177, 2),
        TileShape(64, 64, 4, 16): Tiles(2, 2, False, 115712, 216, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 2, True, 112640, 240, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 0, False, 182272, 254, 1),
        TileShape(64, 128, 4, 16): Tiles(1, 2, True, 90112, 255, 2),
        TileShape(128, 32, 4, 16): Tiles(1, 2, True, 98304, 155, 2),
        TileShape(128, 128, 4, 8): Tiles(1, 2, True, 97280, 255, 2),
        TileShape(128, 64, 8, 8): Tiles(1, 2, True, 113664, 234, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 0, False, 202752, 226, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, True, 156672, 234, 1),
    },
    ("fwd", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(2, 2, False, 34848, 120, 4),
        TileShape(32, 64, 4, 16): Tiles(2, 2, False, 68672, 168, 3),
        TileShape(64, 64, 4, 16): Tiles(2, 2, False, 92224, 200, 2),
        TileShape(128, 64, 4, 16): Tiles(2, 2, True, 112704, 222, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 0, False, 140320, 255, 1),
        TileShape(64, 128, 4, 16): Tiles(2, 2, True, 90176, 254, 2),
        TileShape(128, 32, 4, 16): Tiles(2, 2, False, 109632, 152, 2),
        TileShape(128, 128, 4, 8): Tiles(2, 2, True, 97312, 254, 2),
        TileShape(128, 64, 8, 8): Tiles(2, 2, True, 113696, 220, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 0, False, 147584, 220, 1),
        TileShape(128, 64, 1, 64): Tiles(2, 0, False, 179456, 193, 1),
    },
    ("fwd", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(1, 2, False, 31520, 155, 3),
        TileShape(32, 64, 4, 16): Tiles(1, 2, False, 65536, 201, 2),
        TileShape(64, 64, 4, 16): Tiles(1, 2, False, 89088, 218, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 2, True, 109568, 218, 2),
        TileShape(256, 64, 4, 8): Tiles(1, 0, False, 138240, 255, 1),
        TileShape(64, 128, 4, 16): Tiles(1, 2, True, 87040, 255, 2),
        TileShape(128, 32, 4, 16): Tiles(1, 2, True, 93184, 168, 2),
        TileShape(128, 128, 4, 8): Tiles(1, 2, True, 94208, 255, 2),
        TileShape(128, 64, 8, 8): Tiles(1, 2, True, 110592, 226, 2),
        TileShape(128, 64, 2, 32): Tiles(1, 0, False, 144512, 252, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, True, 150528, 242, 1),
    },
    ("states", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 13376, 48, 3),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 31872, 74, 3),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 48128, 90, 3),
        TileShape(128, 64, 4, 16): Tiles(2, 2, False, 79872, 120, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 2, False, 75776, 176, 2),
        TileShape(64, 128, 4, 16): Tiles(2, 2, False, 61440, 122, 2),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 73728, 86, 3),
        TileShape(128, 128, 4, 8): Tiles(2, 2, False, 50176, 182, 2),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 74752, 118, 3),
        TileShape(128, 64, 2, 32): Tiles(2, 2, False, 95232, 120, 2),
        TileShape(128, 64, 1, 64): Tiles(1, 2, False, 78848, 116, 2),
    },
    ("states", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 11296, 46, 10),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 24640, 64, 8),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 34880, 76, 6),
        TileShape(128, 64, 4, 16): Tiles(2, 3, False, 55360, 110, 4),
        TileShape(256, 64, 4, 8): Tiles(2, 3, False, 52256, 168, 3),
        TileShape(64, 128, 4, 16): Tiles(2, 3, False, 46144, 108, 4),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 49216, 72, 4),
        TileShape(128, 128, 4, 8): Tiles(2, 3, False, 36896, 172, 3),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 54304, 110, 4),
        TileShape(128, 64, 2, 32): Tiles(2, 3, False, 61568, 110, 3),
        TileShape(128, 64, 1, 64): Tiles(2, 2, False, 78080, 110, 2),
    },
    ("states", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(1, 3, False, 8960, 64, 9),
        TileShape(32, 64, 4, 16): Tiles(1, 3, False, 21760, 78, 5),
        TileShape(64, 64, 4, 16): Tiles(1, 3, False, 32768, 92, 5),
        TileShape(128, 64, 4, 16): Tiles(1, 3, False, 53248, 124, 4),
        TileShape(256, 64, 4, 8): Tiles(1, 3, False, 50176, 180, 3),
        TileShape(64, 128, 4, 16): Tiles(1, 3, False, 44032, 124, 4),
        TileShape(128, 32, 4, 16): Tiles(1, 3, False, 47104, 86, 4),
        TileShape(128, 128, 4, 8): Tiles(1, 3, False, 34816, 188, 3),
        TileShape(128, 64, 8, 8): Tiles(1, 3, False, 52224, 124, 4),
        TileShape(128, 64, 2, 32): Tiles(1, 2, False, 59392, 122, 3),
        TileShape(128, 64, 1, 64): Tiles(1, 2, False, 75776, 123, 3),
    },
    ("bwd_fwd", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(1, 2, False, 45056, 179, 2),
        TileShape(32, 64, 4, 16): Tiles(1, 2, False, 83968, 252, 2),
        TileShape(64, 64, 4, 16): Tiles(1, 2, False, 106496, 255, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 0, False, 151552, 255, 1),
        TileShape(256, 64, 4, 8): Tiles(1, 0, False, 164864, 168, 1, 256),
        TileShape(64, 128, 4, 16): Tiles(1, 0, False, 190464, 168, 1, 256),
        TileShape(128, 32, 4, 16): Tiles(1, 0, False, 132096, 254, 1),
        TileShape(128, 128, 4, 8): Tiles(1, 0, False, 140288, 168, 1, 256),
        TileShape(128, 64, 8, 8): Tiles(1, 0, False, 152576, 255, 1),
        TileShape(128, 64, 2, 32): Tiles(1, 0, False, 162816, 255, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, False, 196608, 255, 1),
    },
    ("bwd_fwd", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(1, 0, False, 44224, 164, 3),
        TileShape(32, 64, 4, 16): Tiles(1, 0, False, 83328, 255, 2),
        TileShape(64, 64, 4, 16): Tiles(1, 0, False, 105856, 255, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 0, False, 150912, 255, 1),
        TileShape(256, 64, 4, 8): Tiles(1, 0, False, 165056, 255, 1, 256, 60),
        TileShape(64, 128, 4, 16): Tiles(1, 0, False, 172416, 255, 1),
        TileShape(128, 32, 4, 16): Tiles(1, 0, False, 130432, 255, 1),
        TileShape(128, 128, 4, 8): Tiles(1, 0, False, 139456, 255, 1),
        TileShape(128, 64, 8, 8): Tiles(1, 0, False, 152768, 255, 1),
        TileShape(128, 64, 2, 32): Tiles(1, 0, False, 161536, 255, 1),
        TileShape(128, 64, 1, 64): Tiles(1, 0, False, 193024, 255, 1),
    },
    ("bwd_fwd", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(0, 0, False, 42688, 188, 2),
        TileShape(32, 64, 4, 16): Tiles(0, 0, False, 82304, 255, 2),
        TileShape(64, 64, 4, 16): Tiles(0, 0, False, 104832, 255, 2),
        TileShape(128, 64, 4, 16): Tiles(0, 0, False, 167296, 255, 1, 256),
        TileShape(256, 64, 4, 8): Tiles(0, 0, False, 163264, 255, 1, 256, 20),
        TileShape(64, 128, 4, 16): Tiles(0, 0, False, 188800, 255, 1, 256, 32),
        TileShape(128, 32, 4, 16): Tiles(0, 0, False, 146432, 198, 1, 256),
        TileShape(128, 128, 4, 8): Tiles(0, 0, False, 138688, 255, 1, 256),
        TileShape(128, 64, 8, 8): Tiles(0, 0, False, 150976, 255, 1),
        TileShape(128, 64, 2, 32): Tiles(0, 0, False, 160512, 255, 1),
        TileShape(128, 64, 1, 64): Tiles(0, 0, False, 209408, 185, 1, 256),
    },
    ("bwd_states", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 17792, 47, 3),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 41728, 69, 3),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 56320, 80, 3),
        TileShape(128, 64, 4, 16): Tiles(2, 2, False, 86016, 114, 2),
        TileShape(256, 64, 4, 8): Tiles(2, 2, False, 75776, 174, 2),
        TileShape(64, 128, 4, 16): Tiles(2, 2, False, 80896, 114, 2),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 73728, 80, 3),
        TileShape(128, 128, 4, 8): Tiles(2, 2, False, 57344, 178, 2),
        TileShape(128, 64, 8, 8): Tiles(2, 2, False, 83968, 116, 2),
        TileShape(128, 64, 2, 32): Tiles(2, 2, False, 94208, 116, 2),
        TileShape(128, 64, 1, 64): Tiles(2, 2, False, 111616, 116, 2),
    },
    ("bwd_states", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(2, 3, False, 12480, 45, 10),
        TileShape(32, 64, 4, 16): Tiles(2, 3, False, 28032, 62, 8),
        TileShape(64, 64, 4, 16): Tiles(2, 3, False, 37248, 72, 6),
        TileShape(128, 64, 4, 16): Tiles(2, 3, False, 56704, 104, 4),
        TileShape(256, 64, 4, 8): Tiles(2, 3, False, 50368, 168, 3),
        TileShape(64, 128, 4, 16): Tiles(2, 3, False, 53632, 106, 4),
        TileShape(128, 32, 4, 16): Tiles(2, 3, False, 48512, 72, 4),
        TileShape(128, 128, 4, 8): Tiles(2, 3, False, 38080, 168, 3),
        TileShape(128, 64, 8, 8): Tiles(2, 3, False, 56512, 106, 4),
        TileShape(128, 64, 2, 32): Tiles(2, 3, False, 60160, 104, 3),
        TileShape(128, 64, 1, 64): Tiles(2, 2, False, 69120, 104, 3),
    },
    ("bwd_states", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(1, 3, False, 10944, 64, 8),
        TileShape(32, 64, 4, 16): Tiles(1, 3, False, 26496, 80, 6),
        TileShape(64, 64, 4, 16): Tiles(1, 3, False, 36864, 82, 5),
        TileShape(128, 64, 4, 16): Tiles(1, 3, False, 56320, 116, 4),
        TileShape(256, 64, 4, 8): Tiles(1, 3, False, 50176, 180, 3),
        TileShape(64, 128, 4, 16): Tiles(1, 3, False, 53248, 120, 4),
        TileShape(128, 32, 4, 16): Tiles(1, 3, False, 48128, 96, 4),
        TileShape(128, 128, 4, 8): Tiles(1, 3, False, 37888, 178, 3),
        TileShape(128, 64, 8, 8): Tiles(1, 3, False, 56320, 120, 4),
        TileShape(128, 64, 2, 32): Tiles(1, 2, False, 59392, 116, 3),
        TileShape(128, 64, 1, 64): Tiles(1, 2, False, 67584, 124, 3),
    },
    ("bwd_bwd", "ws"): {
        TileShape(16, 64, 4, 8): Tiles(1, 2, False, 35584, 144, 2),
        TileShape(32, 64, 4, 16): Tiles(1, 2, False, 66048, 225, 2),
        TileShape(64, 64, 4, 16): Tiles(1, 2, False, 92160, 225, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 0, False, 183296, 167, 1, 256),
        TileShape(256, 64, 4, 8): Tiles(1, 0, False, 197632, 168, 1, 256),
        TileShape(64, 128, 4, 16): Tiles(1, 0, False, 165888, 157, 1, 256),
        TileShape(128, 32, 4, 16): Tiles(1, 0, False, 136192, 220, 1),
        TileShape(128, 128, 4, 8): Tiles(1, 0, False, 148480, 255, 1),
        TileShape(128, 64, 8, 8): Tiles(1, 0, False, 184320, 159, 1, 256),
        TileShape(128, 64, 2, 32): Tiles(1, 0, False, 190464, 168, 1, 256),
        TileShape(128, 64, 1, 64): Tiles(1, 0, False, 216064, 147, 1, 256),
    },
    ("bwd_bwd", "tma"): {
        TileShape(16, 64, 4, 8): Tiles(1, 0, False, 36032, 130, 3),
        TileShape(32, 64, 4, 16): Tiles(1, 0, False, 65920, 206, 2),
        TileShape(64, 64, 4, 16): Tiles(1, 0, False, 91520, 249, 2),
        TileShape(128, 64, 4, 16): Tiles(1, 0, False, 182656, 200, 1, 256),
        TileShape(256, 64, 4, 8): Tiles(1, 0, False, 193728, 254, 1),
        TileShape(64, 128, 4, 16): Tiles(1, 0, False, 165248, 220, 1, 256),
        TileShape(128, 32, 4, 16): Tiles(1, 0, False, 135552, 252, 1),
        TileShape(128, 128, 4, 8): Tiles(1, 0, False, 148672, 252, 1),
        TileShape(128, 64, 8, 8): Tiles(1, 0, False, 184512, 175, 1, 256),
        TileShape(128, 64, 2, 32): Tiles(1, 0, False, 190208, 207, 1, 256),
        TileShape(128, 64, 1, 64): Tiles(1, 0, False, 193024, 252, 1),
    },
    ("bwd_bwd", "plain"): {
        TileShape(16, 64, 4, 8): Tiles(0, 0, False, 34496, 151, 3),
        TileShape(32, 64, 4, 16): Tiles(0, 0, False, 64896, 234, 2),
        TileShape(64, 64, 4, 16): Tiles(0, 0, False, 90496, 255, 2, 128, 8),
        TileShape(128, 64, 4, 16): Tiles(0, 0, False, 181632, 230, 1, 256),
        TileShape(256, 64, 4, 8): Tiles(0, 0, False, 196032, 207, 1, 256),
        TileShape(64, 128, 4, 16): Tiles(0, 0, False, 164224, 230, 1, 256),
        TileShape(128, 32, 4, 16): Tiles(0, 0, False, 155648, 179, 1, 256),
        TileShape(128, 128, 4, 8): Tiles(0, 0, False, 147392, 255, 1),
        TileShape(128, 64, 8, 8): Tiles(0, 0, False, 182720, 207, 1, 256),
        TileShape(128, 64, 2, 32): Tiles(0, 0, False, 189184, 244, 1, 256),
        TileShape(128, 64, 1, 64): Tiles(0, 0, False, 192000, 255, 1),
    },
}  # fmt: skip
