"""The sizes every benchmark takes its inputs from: COCO at 800x1333, and real numbers of objects per image.

A benchmark measured on round numbers flatters: a batch of real images has as many targets as its images happen to
show, from none to forty. The counts below were taken from COCO images in the order in which they were read.
"""

from __future__ import annotations

from dataclasses import dataclass

# Non-crowd boxes of 64 consecutive images out of 529 COCO images (over all of them: median 4, mean 7.4, largest 43).
COCO_TARGETS = (
    *(24, 0, 1, 22, 2, 4, 3, 2, 5, 3, 2, 4, 11, 2, 4, 4, 7, 2, 13, 4, 1, 4, 15, 12, 11, 8, 11, 6, 1, 2, 3, 5),
    *(2, 5, 0, 38, 3, 17, 2, 4, 3, 3, 4, 2, 4, 13, 9, 11, 1, 5, 16, 4, 2, 40, 4, 14, 13, 2, 13, 4, 8, 1, 7, 2),
)

# Nuclei of 16 consecutive microscope pictures of the 2018 Data Science Bowl (over all 664: median 27, largest 375).
CROWDED_TARGETS = (84, 11, 29, 8, 6, 75, 53, 15, 289, 33, 47, 68, 5, 37, 24, 14)


@dataclass(frozen=True)
class Shape:
    """One size of a training step. ``targets`` holds the number of objects of each image of the batch."""

    name: str
    targets: tuple[int, ...]
    num_queries: int = 100
    num_classes: int = 91
    num_layers: int = 6
    image_size: tuple[int, int] = (800, 1333)
    stride: int = 32

    @property
    def batch(self) -> int:
        """Images in the batch."""
        return len(self.targets)

    @property
    def num_tokens(self) -> int:
        """Tokens of the encoder for one image of ``image_size``: its feature map at ``stride``, rounded up."""
        height, width = self.image_size
        return -(-height // self.stride) * -(-width // self.stride)


# The original trains with two images a GPU, on eight GPUs (together: sixteen).
COCO_PER_GPU = Shape("coco-2", COCO_TARGETS[2:4])
COCO_SMALL = Shape("coco-8", COCO_TARGETS[:8])
COCO_BATCH = Shape("coco-16", COCO_TARGETS[:16])
COCO_LARGE = Shape("coco-32", COCO_TARGETS[:32])
# Later models have three hundred queries, and crowded data sets a hundred objects in an image.
COCO_QUERIES = Shape("coco-32-queries-300", COCO_TARGETS[:32], num_queries=300)
HUNDRED_TARGETS = Shape("hundred-targets-8", (100,) * 8, num_queries=300)
CROWDED = Shape("crowded-16", CROWDED_TARGETS, num_queries=300, num_classes=2)

MATCHING_SHAPES = (COCO_PER_GPU, COCO_SMALL, COCO_LARGE, COCO_QUERIES, HUNDRED_TARGETS, CROWDED)
FOCAL_SHAPES = (COCO_SMALL, COCO_QUERIES)
LOSS_SHAPES = (COCO_PER_GPU, COCO_SMALL, COCO_LARGE)

# Heights and widths of four consecutive images of COCO val2017, scaled to 800 on the shorter side, at most 1333 on the
# longer one; and the commonest shape of an image.
COCO_SIZES = ((800, 1204), (1064, 800), (800, 1071), (1049, 800))
COMMON_SIZE = (800, 1066)


@dataclass(frozen=True)
class MapShape:
    """The feature maps of a batch of images: ``sizes`` in pixels, padded to the largest height and width."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    stride: int = 32
    num_queries: int = 100

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each image's valid cells."""
        return tuple((-(-height // self.stride), -(-width // self.stride)) for height, width in self.sizes)

    @property
    def frame(self) -> tuple[int, int]:
        """Rows and columns of the padded maps."""
        return max(h for h, _ in self.cells), max(w for _, w in self.cells)


ONE_MAP = MapShape("one", (COMMON_SIZE,))
MIXED_MAPS = MapShape("mixed-4", COCO_SIZES)
# The same at the smallest scale that the original trains at: of the larger one a training step of the original's way
# takes ten seconds and more on two cores, and gigabytes.
SMALL_MIXED_MAPS = MapShape("mixed-4-480", tuple((480 * h // 800, 480 * w // 800) for h, w in COCO_SIZES))
# A dilated last stage (DC5): four times the tokens.
DILATED_MAP = MapShape("dilated-one", (COMMON_SIZE,), stride=16)

MAP_SHAPES = (ONE_MAP, MIXED_MAPS, DILATED_MAP)


@dataclass(frozen=True)
class MaskShape:
    """One image of a panoptic model, and the photograph that it was scaled from."""

    name: str
    image_size: tuple[int, int]
    photograph_size: tuple[int, int]
    num_targets: int
    num_queries: int = 100

    def map_size(self, stride: int) -> tuple[int, int]:
        """Rows and columns of the feature map at a stride, rounded up."""
        height, width = self.image_size
        return -(-height // stride), -(-width // stride)


# A square picture, so that all maps double exactly; ten objects are a little more than COCO's mean.
MASKS = MaskShape("640x640", (640, 640), (512, 512), 10)


@dataclass(frozen=True)
class TrainShape:
    """A training batch of images of one size. ``targets`` holds the number of objects of each."""

    name: str
    image_size: tuple[int, int]
    targets: tuple[int, ...]
    num_classes: int = 91


# Two images a process, as in the original's training; small enough for a CPU.
TRAIN_STEP = TrainShape("640x640 batch 2", (640, 640), COCO_TARGETS[2:4])


@dataclass(frozen=True)
class InferenceShape:
    """Images of one size through a whole model."""

    image_size: tuple[int, int] = COMMON_SIZE
    batch: int = 1
    backbone: str = "resnet50"
    dilation: bool = False

    @property
    def name(self) -> str:
        """The model and the size."""
        model = self.backbone + ("-dc5" if self.dilation else "")
        return f"{model} {self.batch}x{self.image_size[0]}x{self.image_size[1]}"


SMALL_IMAGE = (480, 640)
LATENCY_SHAPES = (InferenceShape(), InferenceShape(SMALL_IMAGE), InferenceShape((800, 1333)))
THROUGHPUT_SHAPES = (InferenceShape(SMALL_IMAGE, batch=4),)
OTHER_MODELS = (InferenceShape(SMALL_IMAGE, dilation=True), InferenceShape(SMALL_IMAGE, backbone="resnet101"))
INFERENCE_SHAPES = (*LATENCY_SHAPES, *THROUGHPUT_SHAPES, *OTHER_MODELS)


@dataclass(frozen=True)
class PhotographShape:
    """JPEG files of one (width, height), and the sides that they are scaled to."""

    name: str
    size: tuple[int, int]
    batch: int = 2
    shortest: int = 800
    longest: int = 1333


# The commonest size of COCO's; a telephone's, too small to be decoded at half its size; a camera's, which is not.
PHOTOGRAPHS = (
    PhotographShape("coco-2", (640, 480)),
    PhotographShape("12-megapixels-2", (4000, 3000)),
    PhotographShape("24-megapixels-2", (6000, 4000)),
)


@dataclass(frozen=True)
class ConvShape:
    """A layer of a convolutional network for one image; ``size`` is its input's."""

    name: str
    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: int = 1
    stride: int = 1
    residual: bool = False
    dilation: int = 1

    @property
    def padding(self) -> int:
        """Such that stride 1 keeps the size."""
        return self.kernel // 2 * self.dilation

    @property
    def gflop(self) -> float:
        """Of direct convolution, 10^9 multiplications and additions."""
        rows, columns = (-(-side // self.stride) for side in self.size)
        return 2e-9 * rows * columns * self.out_channels * self.channels * self.kernel**2

    @property
    def takes_winograd(self) -> bool:
        """Whether Winograd's algorithm can compute it."""
        return self.kernel == 3 and self.stride == 1 and self.dilation == 1


# ResNet-50's maps of an image of COMMON_SIZE at strides 4 to 32.
_AT_4, _AT_8, _AT_16, _AT_32 = (tuple(-(-side // stride) for side in COMMON_SIZE) for stride in (4, 8, 16, 32))
RESNET50_STEM = ConvShape("stem", 3, COMMON_SIZE, 64, 7, 2)
RESNET50_LAYERS = tuple(
    layer
    for number, (larger, size, width) in enumerate(
        ((_AT_4, _AT_4, 64), (_AT_4, _AT_8, 128), (_AT_8, _AT_16, 256), (_AT_16, _AT_32, 512)), 1
    )
    for layer in (
        ConvShape(f"layer{number} first 1x1", width * (2 if number > 1 else 1), larger, width),
        *([ConvShape(f"layer{number} 3x3 stride 2", width, larger, width, 3, 2)] if number > 1 else []),
        ConvShape(f"layer{number} shortcut", width * (2 if number > 1 else 1), larger, 4 * width, 1, 2 - (number == 1)),
        ConvShape(f"layer{number} 1x1 down", 4 * width, size, width),
        ConvShape(f"layer{number} 3x3", width, size, width, 3),
        ConvShape(f"layer{number} 1x1 up", width, size, 4 * width, residual=True),
    )
) + (ConvShape("dilated layer4 3x3", 512, _AT_16, 512, 3, dilation=2),)


@dataclass(frozen=True)
class BlockShape:
    """A bottleneck block of a ResNet; ``size`` is its input's, ``channels`` come in, four times ``planes`` go out."""

    name: str
    channels: int
    planes: int
    size: tuple[int, int]
    stride: int = 1
    batch: int = len(TRAIN_STEP.targets)


# One of each stage for the images of TRAIN_STEP, and one that halves its map.
RESNET50_BLOCKS = (
    *(
        BlockShape(f"layer{n} {640 >> n + 1}x{640 >> n + 1}", 128 << n, 32 << n, (640 >> n + 1, 640 >> n + 1))
        for n in (1, 2, 3, 4)
    ),
    BlockShape("layer3 first 80x80", 512, 256, (80, 80), stride=2),
)
