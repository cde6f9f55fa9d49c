"""Compiled image kernels: decode a JPEG once, write every view of it, in Pillow's own arithmetic.

Every operation works on bytes and rounds where Pillow's does, so a view equals what torchvision's
transforms make of a PIL image with the same parameters. (For hue see `adjust_hue`.) Since Pillow
rounds to 8 bits after every operation, one byte per value is also fastest: an image of 224 x 224
fits the L2 cache, and 64 values fill one vector register.

All arithmetic is integer or correctly rounded float (no reordering, no fused multiply-add), so the
bits depend neither on the CPU's vector width nor on the number of threads. The one exception is
`math.exp` in `random_crop`, which the C library computes.

The JPEG decoder is libjpeg-turbo, called directly: FFCV's `imdecode` asks for the fast, inaccurate
DCT and drops warnings.

All kernels are in this one file because numba's cache is keyed by file: it would not notice a
change of a callee in another file. They hold no state and release the GIL.
"""

import inspect
import logging
import math
from collections import namedtuple
from collections.abc import Callable

import llvmlite.binding as llvm
import numpy as np
from jaxtyping import Integer, UInt64
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ssl_xcit.data.turbojpeg import load_turbojpeg

logger = logging.getLogger(__name__)


# Makes its functions known to compiled code. At import, because a kernel from numba's cache needs
# the symbols before anything else runs.
load_turbojpeg(llvm.load_library_permanently)

_address, _size, _int = types.uintp, types.uintp, types.int32
tj_init = types.ExternalFunction("tjInitDecompress", _address())
tj_destroy = types.ExternalFunction("tjDestroy", _int(_address))
tj_header = types.ExternalFunction(
    "tjDecompressHeader3", _int(_address, _address, _size, *[_address] * 4)
)
tj_decompress = types.ExternalFunction(
    "tjDecompress2", _int(_address, _address, _size, _address, _int, _int, _int, _int, _int)
)
tj_error_code = types.ExternalFunction("tjGetErrorCode", _int(_address))
tj_error_text = types.ExternalFunction("tjGetErrorStr2", _address(_address))
TJPF_RGB, TJFLAG_ACCURATEDCT, TJERR_WARNING = 0, 4096, 0

# NaN and infinity cannot occur, so minimum and maximum may compile to one instruction each. None of
# these flags lets the compiler reorder or fuse.
JIT = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz"}}


# Whether numba can write its cache, beside this file or in the user's cache folder
CACHE = True
try:
    njit(cache=True)(lambda: None)
except RuntimeError:
    logger.warning("no folder for numba's cache can be written; set NUMBA_CACHE_DIR to one")
    CACHE = False


def kernel(function: Callable) -> Callable:
    """Compile `function` at its first call."""
    # Under pytest, jaxtyping has wrapped it; numba needs the bare function.
    return njit(cache=CACHE, **JIT)(inspect.unwrap(function))


U64 = np.uint64
F32 = np.float32

OK, DAMAGED, CORRUPT, TRUNCATED, WRONG_SIZE = 0, 1, 2, 3, 4
"""Status of an image: DAMAGED is shown as decoded, as in Pillow; the others after OK are not."""

BICUBIC, BILINEAR = 0, 1
RANDOM_CROP, CENTER_CROP, SQUARE, SIMPLE_CROP = 0, 1, 2, 3

VIEW = np.dtype(
    [
        ("kind", "i8"),  # RANDOM_CROP, CENTER_CROP, SQUARE or SIMPLE_CROP
        ("size", "i8"),  # pixels a side
        ("resize", "i8"),  # CENTER_CROP: the short side before it is cut; pixels
        ("filter", "i8"),  # BICUBIC or BILINEAR
        ("scale", "f8", 2),  # of the image's area
        ("log_ratio", "f8", 2),  # of width / height
        ("flip", "f8"),  # a probability, like jitter, grayscale, blur and solarize
        ("jitter", "f8"),
        ("strengths", "f8", 4),  # of brightness, contrast, saturation and hue
        ("grayscale", "f8"),
        ("blur", "f8"),
        ("sigma", "f8", 2),  # pixels
        ("solarize", "f8"),
        ("one_of", "i8"),  # 1: one of grayscale, solarize and blur, before the jitter
    ],
    align=True,
)
"""One view as the kernels read it; `ssl_xcit.data.loader` fills it from `ssl_xcit.data.views`."""

# Counters of the draws of one view. A crop takes two draws per try, 0 to 19.
D_TOP, D_LEFT, D_FLIP, D_JITTER, D_STRENGTHS = range(20, 25)
D_ORDER, D_GRAYSCALE, D_BLUR, D_SIGMA, D_SOLARIZE, D_ONE_OF, DRAWS = range(28, 35)

PADDING = 4
"""Pixels by which a SIMPLE_CROP may reach over each edge of the resized image."""

ROWS = 32
"""Image rows that go through the horizontal pass together."""
LANES = 32
"""Values that one step of `weighted_rows` computes side by side."""
PRECISION = 22
"""Fractional bits of a resampling weight: Pillow's 32 - 8 bits of a pixel - 2 of headroom."""


# --- vector code that numba would not find by itself -------------------------------------------


def _int32(operation: str):
    """A 32-bit integer operation: numba's own widen to 64 bits, which halves the vector."""

    @intrinsic
    def emit(_, a, b):
        def code(context, builder, signature, arguments):
            return getattr(builder, operation)(*arguments)

        return types.int32(types.int32, types.int32), code

    return emit


add32, mul32, shift32 = _int32("add"), _int32("mul"), _int32("lshr")


@intrinsic
def take_next(_, counter):
    """counter[0]++, atomically: the next piece of work for whichever thread is free."""

    def code(context, builder, signature, arguments):
        start = _pointers(context, builder, signature, arguments)[0]
        return builder.atomic_rmw("add", start, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


@intrinsic
def byte_at(_, address):
    """The byte at an address."""

    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        return builder.load(pointer)

    return types.uint8(types.uintp), code


@intrinsic
def transpose(_, out, out_start, out_stride, source, source_start, source_stride):
    """Bytes: out[q * out_stride + r] = source[r * source_stride + q] for r < 16, q < ROWS.

    Four rounds of interleaving row i with row i + 8 move each bit of the row number into the column
    number: a 16 x 16 transposition per 16 columns, all of them side by side in one register.
    """

    def code(context, builder, signature, arguments):
        out, source = _pointers(context, builder, signature, arguments)
        (_, out_start, out_stride, _, source_start, source_stride) = arguments
        rows = [
            _load(builder, source, _index(builder, source_start, source_stride, r), ROWS)
            for r in range(16)
        ]
        low = [16 * (q // 16) + q % 16 // 2 + ROWS * (q % 2) for q in range(ROWS)]
        high = [8 + q for q in low]
        for _ in range(4):
            pairs = list(zip(rows[:8], rows[8:], strict=True))
            rows = [
                builder.shuffle_vector(a, b, _int_vector(mask))
                for a, b in pairs
                for mask in (low, high)
            ]
        for q in range(ROWS):
            block = list(range(16 * (q // 16), 16 * (q // 16) + 16))
            row = rows[q % 16]
            part = builder.shuffle_vector(row, row, _int_vector(block))
            _store(builder, out, _index(builder, out_start, out_stride, q), part)
        return context.get_dummy_value()

    integer = types.intp
    return types.void(out, integer, integer, source, integer, integer), code


@intrinsic
def weighted_rows(
    _, out, out_start, source, source_start, stride, weights, first, step, taps, width
):
    """Bytes: out[q] = sum of weights[first + k * step] * source[k * stride + q] over k < taps.

    Divided by 2**22, rounded and clipped; for q < width, rounded up to a multiple of LANES. The
    weights are int32.
    """

    def code(context, builder, signature, arguments):
        out, source, weights = _pointers(context, builder, signature, arguments)
        (_, out_start, _, source_start, stride, _, first, step, taps, width) = arguments
        wide = ir.VectorType(ir.IntType(32), LANES)

        def constant(value: int):
            return ir.Constant(wide, [value] * LANES)

        def sums(q, blocks: int) -> None:
            """Outputs q .. q + blocks * LANES - 1, in `blocks` running sums."""
            totals = [cgutils.alloca_once(builder, wide) for _ in range(blocks)]
            starts = [builder.add(q, ir.Constant(q.type, block * LANES)) for block in range(blocks)]
            for total in totals:
                builder.store(constant(1 << (PRECISION - 1)), total)
            with cgutils.for_range(builder, taps) as loop:
                place = builder.add(first, builder.mul(loop.index, step))
                weight = builder.load(builder.gep(weights, [place]))
                weight = builder.insert_element(
                    ir.Constant(wide, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0)
                )
                weight = builder.shuffle_vector(weight, weight, _int_vector([0] * LANES))
                line = builder.add(source_start, builder.mul(loop.index, stride))
                for total, start in zip(totals, starts, strict=True):
                    pixels = _load(builder, source, builder.add(line, start), LANES)
                    product = builder.mul(builder.zext(pixels, wide), weight)
                    builder.store(builder.add(builder.load(total), product), total)
            for total, start in zip(totals, starts, strict=True):
                value = builder.ashr(builder.load(total), constant(PRECISION))
                for bound, beyond in ((constant(0), "<"), (constant(255), ">")):
                    value = builder.select(builder.icmp_signed(beyond, value, bound), bound, value)
                value = builder.trunc(value, ir.VectorType(ir.IntType(8), LANES))
                _store(builder, out, builder.add(out_start, start), value)

        # Three sums per pass share a weight: 96 lanes are a column of 3 channels, or 96 pixels
        triple = ir.Constant(width.type, 3 * LANES)
        tripled = builder.mul(builder.sdiv(width, triple), triple)
        zero, single = ir.Constant(width.type, 0), ir.Constant(width.type, LANES)
        with cgutils.for_range_slice(builder, zero, tripled, triple) as (q, _):
            sums(q, 3)
        with cgutils.for_range_slice(builder, tripled, width, single) as (q, _):
            sums(q, 1)
        return context.get_dummy_value()

    integer = types.intp
    arguments = (out, integer, source, integer, integer, weights, *[integer] * 4)
    return types.void(*arguments), code


def _pointers(context, builder, signature, arguments) -> list:
    """Where the data of the array arguments begin."""
    return [
        context.make_array(kind)(context, builder, value).data
        for kind, value in zip(signature.args, arguments, strict=True)
        if isinstance(kind, types.Array)
    ]


def _index(builder, start, stride, number: int):
    return builder.add(start, builder.mul(stride, ir.Constant(stride.type, number)))


def _int_vector(values: list[int]):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), values)


def _vector_pointer(builder, base, offset, lanes: int):
    kind = ir.VectorType(ir.IntType(8), lanes)
    return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())


def _load(builder, base, offset, lanes: int):
    return builder.load(_vector_pointer(builder, base, offset, lanes), align=1)


def _store(builder, base, offset, value) -> None:
    builder.store(value, _vector_pointer(builder, base, offset, value.type.count), align=1)


@kernel
def copy(out, out_start, source, start, count):
    """out[out_start + q] = source[start + q], q < count: 80 times as fast as assigning a slice."""
    out, source = out[out_start : out_start + count], source[start : start + count]
    for q in range(count):
        out[q] = source[q]


# --- random numbers: see ssl_xcit/runtime/draws.py ---------------------------------------------


@kernel
def mix64(z):
    """SplitMix64's finaliser on uint64, elementwise if `z` is an array."""
    z = z + U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


mix64_array = mix64.py_func
"""`mix64` of an array, in numpy."""


def sample_keys(
    seed: int, epoch: int, indices: Integer[np.ndarray, "n"]
) -> UInt64[np.ndarray, "n"]:
    """Keys of images in an epoch; view v draws from mix64(key ^ mix64(v + 1))."""
    key = mix64_array(np.array([seed % 2**64], U64)) ^ U64(epoch % 2**64)
    return mix64_array(mix64_array(key) ^ indices.astype(U64))


# Streams of an image that belong to no view: its place in the epoch's order, and its replacement if
# it is corrupt. The first is mix64(0), where view v has mix64(v + 1).
ORDER_STREAM = mix64_array(np.zeros(1, U64))[0]
SUBSTITUTE_STREAM = mix64_array(np.array([2**63], U64))[0]


@kernel
def draw(draws, key):
    """Fill `draws` with the key's draws 0, 1, ...: float64 in [0, 1)."""
    for counter in range(draws.size):
        draws[counter] = float(mix64(key ^ mix64(U64(counter))) >> U64(11)) * 2.0**-53


@kernel
def random_crop(draws, height, width, scale, log_ratio):
    """(top, left, height, width) of a random crop, drawn as torchvision's RandomResizedCrop does.

    Ten attempts with an area in `scale` of the image and an aspect ratio whose logarithm is uniform
    in `log_ratio`; then the largest central crop of an allowed ratio.
    """
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        log = log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[2 * attempt + 1]
        w = round(math.sqrt(area * math.exp(log)))
        h = round(math.sqrt(area / math.exp(log)))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[D_TOP] * (height - h + 1)), int(draws[D_LEFT] * (width - w + 1)), h, w
    low, high = math.exp(log_ratio[0]), math.exp(log_ratio[1])
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w


# --- resampling: Pillow's Resample.c, 8 bits per channel ---------------------------------------


@kernel
def filter_weight(filter_, x):
    """Bicubic (a = -1/2) or bilinear filter at a distance `x`."""
    x = abs(x)
    if filter_ == BILINEAR:
        return max(1.0 - x, 0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return near if x < 1.0 else (far if x < 2.0 else 0.0)


@kernel
def resampling_weights(axis, size_in, size_out, first, count, filter_, flip):
    """Weights of output pixels first .. first + count - 1 when size_in becomes size_out pixels.

    Output pixel i is the sum of `axis.taps[i]` input pixels from `axis.starts[i]` on; input k of
    them has the weight `axis.weights[k * count + i]`, in multiples of 2**-22. With `flip` the order
    of the outputs is reversed. A shrinking image is filtered by a wider filter (antialiasing).

    Returns (origin, extent): the input pixels in use are origin .. origin + extent - 1, and
    `axis.starts` counts from the origin.
    """
    scale = size_in / size_out
    filter_scale = max(scale, 1.0)
    support = filter_scale * (1.0 if filter_ == BILINEAR else 2.0)
    starts, taps = axis.starts[:count], axis.taps[:count]
    exact, totals, centers = axis.exact, axis.totals[:count], axis.centers[:count]
    origin, end = size_in, 0
    for i in range(count):
        center = (first + (count - 1 - i if flip else i) + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        stop = min(int(center + support + 0.5), size_in)
        centers[i], starts[i], taps[i], totals[i] = center, start, stop - start, 0.0
        origin, end = min(origin, start), max(end, stop)
    most = taps.max()
    for k in range(most):  # tap by tap, not pixel by pixel: these loops are long and vectorise
        line = exact[k * count : (k + 1) * count]
        for i in range(count):
            x = (k + starts[i] - centers[i] + 0.5) * (1.0 / filter_scale)
            weight = filter_weight(filter_, x)
            line[i] = weight if k < taps[i] else 0.0
            totals[i] += line[i]
    for k in range(most):
        line, weights = exact[k * count : (k + 1) * count], axis.weights[k * count :]
        for i in range(count):
            weight = line[i] / totals[i] * (1 << PRECISION)
            weights[i] = np.int32(weight + (-0.5 if weight < 0 else 0.5))
    for i in range(count):
        starts[i] -= origin
    return origin, end - origin


Axis = namedtuple("Axis", "starts taps weights exact totals centers")
"""Weights along one axis and, in the last three, what they are made from."""
Scratch = namedtuple(
    "Scratch",
    "pixels columns resized between frame line x y planes blurred_a blurred_b draws header",
)
"""Working memory of one thread; see `make_scratch`."""


@kernel
def round_up(value, multiple):
    """The next multiple of `multiple`."""
    return (value + multiple - 1) // multiple * multiple


@kernel
def make_axis(size, weights):
    """Room for the weights of `size` output pixels."""
    starts, taps = np.empty(size, np.int32), np.empty(size, np.int32)
    return Axis(
        starts, taps, np.empty(weights, np.int32), np.empty(weights), np.empty(size), np.empty(size)
    )


@kernel
def make_scratch(views, channels, max_pixels, max_height, max_width):
    """Working memory for images of up to max_pixels, max_height and max_width."""
    size, weights, edge = 0, 0, 0
    max_side = max(max_height, max_width)
    for view in views:
        size = max(size, view.size)
        out = view.resize if view.kind == CENTER_CROP else view.size
        taps = 2 * math.ceil(2.0 * max(max_side / out, 1.0)) + 1
        weights = max(weights, view.size * taps)
        edge = max(edge, int(box_radius(view.sigma[1])) + 1)
    padded = round_up(size, LANES)
    blurred = (size + 2 * edge) * (size + 2 * edge)
    u8 = np.uint8
    # Blocks of ROWS rows and columns are read as a whole, also beyond an image's edges.
    return Scratch(
        np.empty(channels * (max_pixels + ROWS * max_width) + ROWS, u8),  # the decoded image
        np.empty((channels * max_width + ROWS) * ROWS, u8),  # ROWS of its rows as columns
        np.empty(round_up(size, 16) * channels * ROWS, u8),  # those columns, filtered
        np.empty(channels * (max_side + ROWS) * (padded + ROWS), u8),  # after the first pass
        np.empty(channels * (size + ROWS) * padded, u8),  # after the second, if horizontal
        np.empty(padded, u8),  # one line after the second, if vertical
        make_axis(size, weights),
        make_axis(size, weights),
        np.empty(channels * size * size, u8),  # a view before it is normalised
        np.empty(blurred, u8),
        np.empty(blurred, u8),
        np.empty(DRAWS),
        np.empty(4, np.int32),  # what the JPEG decoder says of a header
    )


@kernel
def horizontal_pass(out, plane, padded, work, source, start, line, rows, width, side, channels):
    """Filter `rows` rows of interleaved pixels along x, into out[c * plane + y * padded + x].

    Weighted sums are fast along contiguous memory, so 32 rows are transposed, weighted (all
    channels of 32 rows in one sum) and transposed back.
    """
    depth = channels * ROWS
    for y in range(0, rows, ROWS):
        for r in range(0, ROWS, 16):
            first = start + (y + r) * line
            for q in range(0, width * channels, ROWS):
                transpose(work.columns, q * ROWS + r, ROWS, source, first + q, line)
        for x in range(side):
            first, taps = work.x.starts[x] * depth, work.x.taps[x]
            weighted_rows(
                work.resized, x * depth, work.columns, first, depth, work.x.weights, x, side, taps,
                depth,
            )  # fmt: skip
        for c in range(channels):
            for x in range(0, side, 16):
                first = c * plane + y * padded + x
                transpose(out, first, padded, work.resized, x * depth + c * ROWS, depth)


@kernel
def resize(planes, work, channels, width, box, out_size, window, filter_, flip):
    """Resample part of the image in `work.pixels` (rows of width * channels bytes) into `planes`.

    The box (top, left, height, width) is resized to out_size (height, width); of the result, the
    square window (top, left, side) is written, planar (channels, side, side).

    Two passes with bytes in between. Pillow's first pass is the horizontal one; since version 13 it
    is the vertical one if the height shrinks by more than twice as many pixels as the width.
    """
    top, left, box_height, box_width = box
    y_first, x_first, side = window
    row, rows = resampling_weights(work.y, box_height, out_size[0], y_first, side, filter_, False)
    column, columns = resampling_weights(
        work.x, box_width, out_size[1], x_first, side, filter_, flip
    )
    padded = round_up(side, LANES)
    line = width * channels
    start = (top + row) * line + (left + column) * channels
    shrunk_height, shrunk_width = box_height - out_size[0], box_width - out_size[1]
    if shrunk_height > 0 and shrunk_height > 2 * shrunk_width:
        count = columns * channels
        line_out = round_up(count, LANES)
        for y in range(side):
            weighted_rows(
                work.between, y * line_out, work.pixels, start + work.y.starts[y] * line, line,
                work.y.weights, y, side, work.y.taps[y], count,
            )  # fmt: skip
        plane = (side + ROWS) * padded
        horizontal_pass(
            work.frame, plane, padded, work, work.between, 0, line_out, side, columns,
            side, channels,
        )  # fmt: skip
        for c in range(channels):
            for y in range(side):
                copy(planes, (c * side + y) * side, work.frame, c * plane + y * padded, side)
    else:
        plane = (rows + ROWS) * padded
        horizontal_pass(
            work.between, plane, padded, work, work.pixels, start, line, rows, columns,
            side, channels,
        )  # fmt: skip
        for c in range(channels):
            for y in range(side):
                weighted_rows(
                    work.line, 0, work.between, c * plane + work.y.starts[y] * padded, padded,
                    work.y.weights, y, side, work.y.taps[y], side,
                )  # fmt: skip
                copy(planes, (c * side + y) * side, work.line, 0, side)


# --- colour: Pillow's Blend.c and Convert.c ----------------------------------------------------


@kernel
def blend(background, pixel, factor):
    """background + factor * (pixel - background), clipped and truncated; float32 -> uint8."""
    value = background + factor * (pixel - background)
    return np.uint8(np.int32(min(max(value, F32(0)), F32(255))))


@kernel
def luma(r, g, b):
    """Pillow's conversion to gray, int32: 0.299 r + 0.587 g + 0.114 b in 16-bit fixed point."""
    total = add32(mul32(r, 19595), add32(mul32(g, 38470), add32(mul32(b, 7471), 0x8000)))
    return shift32(total, 16)


@kernel
def adjust_brightness(image, factor):
    """Blend with black."""
    for q in range(image.size):
        image[q] = blend(F32(0), F32(image[q]), factor)


@kernel
def adjust_contrast(image, channels, factor):
    """Blend with the rounded mean of the gray image; of all channels unless there are 3."""
    n = image.size // channels
    total = 0
    if channels == 3:
        for start in range(0, n, 1 << 16):  # few enough values for sums of 32 bits
            r, g, b = image[start:n], image[n + start : 2 * n], image[2 * n + start :]
            part = np.int32(0)
            for q in range(min(r.size, 1 << 16)):
                part = add32(part, luma(r[q], g[q], b[q]))
            total += part
    else:
        for q in range(image.size):
            total += image[q]
        n = image.size
    mean = F32(int(total / n + 0.5))
    for q in range(image.size):
        image[q] = blend(mean, F32(image[q]), factor)


@kernel
def adjust_saturation(image, factor):
    """Blend with the gray image; RGB."""
    n = image.size // 3
    r, g, b = image[:n], image[n : 2 * n], image[2 * n :]
    for q in range(n):
        gray = F32(luma(r[q], g[q], b[q]))
        r[q] = blend(gray, F32(r[q]), factor)
        g[q] = blend(gray, F32(g[q]), factor)
        b[q] = blend(gray, F32(b[q]), factor)


@kernel
def grayscale(image):
    """The gray value in all three channels; RGB."""
    n = image.size // 3
    r, g, b = image[:n], image[n : 2 * n], image[2 * n :]
    for q in range(n):
        gray = np.uint8(luma(r[q], g[q], b[q]))
        r[q] = gray
        g[q] = gray
        b[q] = gray


@kernel
def adjust_hue(image, shift):
    """Turn the hue by `shift` (0 to 255, in 1/255 turns, modulo 256), through 8-bit HSV; RGB.

    Equal to Pillow's for all 2**24 colours. One place needs care: Pillow adds the terms of the hue
    in double precision and rounds the sum to single.
    """
    n = image.size // 3
    reds, greens, blues = image[:n], image[n : 2 * n], image[2 * n :]
    for q in range(n):
        r, g, b = F32(reds[q]), F32(greens[q]), F32(blues[q])
        high, low = max(r, max(g, b)), min(r, min(g, b))
        span = high - low
        if r == high:
            sector, more, less = F32(0), b, g
        elif g == high:
            sector, more, less = F32(2), r, b
        else:
            sector, more, less = F32(4), g, r
        divisor = max(span, F32(1))
        more, less = (high - more) / divisor, (high - less) / divisor
        difference = more - less
        back = difference - more
        error = (more - (difference - back)) - (less + back)
        total = sector + difference
        error += difference - (total - sector)  # total + error is exact, as in double precision
        hue = (total + error) / F32(6)
        hue = hue + F32(1) if hue < F32(0) else hue
        hue = np.floor(hue * F32(255)) + shift
        hue = hue - F32(256) if hue >= F32(256) else hue
        saturation = np.floor(F32(255) * span / max(high, F32(1)))
        # The three channels are v (1 - s w), w = 0 to 1 by the distance of 6 hues from 3, 2 and 4
        turn = F32(6) * hue
        reds[q] = hsv_channel(F32(510) - abs(turn - F32(765)), saturation, high)
        greens[q] = hsv_channel(abs(turn - F32(510)) - F32(255), saturation, high)
        blues[q] = hsv_channel(abs(turn - F32(1020)) - F32(255), saturation, high)


@kernel
def hsv_channel(weight, saturation, value):
    """value (1 - saturation * weight), each of the three in 1/255: exact in float32 but rounded."""
    weight = min(max(weight, F32(0)), F32(255))
    return np.uint8(
        np.int32(value * (F32(65025) - saturation * weight) * F32(1 / 65025) + F32(0.5))
    )


@kernel
def solarize(image):
    """Invert values from 128 on."""
    for q in range(image.size):
        value = image[q]
        image[q] = value if value < 128 else 255 - value


@kernel
def jitter(image, channels, view, draws):
    """Brightness, contrast, saturation and hue by random factors in random order."""
    rank, done = int(draws[D_ORDER] * 24), 0
    for left in range(4, 0, -1):  # the rank's factorial digits count the operations still to do
        skip, operation = rank % left, 0
        rank //= left
        while skip > 0 or (done >> operation) & 1:
            skip -= 1 - ((done >> operation) & 1)
            operation += 1
        done |= 1 << operation
        strength, uniform = view.strengths[operation], draws[D_STRENGTHS + operation]
        if strength == 0 or (operation >= 2 and channels != 3):
            continue
        low = max(1 - strength, 0.0)
        factor = F32(low + (1 + strength - low) * uniform)
        if operation == 0:
            adjust_brightness(image, factor)
        elif operation == 1:
            adjust_contrast(image, channels, factor)
        elif operation == 2:
            adjust_saturation(image, factor)
        else:
            turn = (2 * uniform - 1) * strength
            adjust_hue(image, F32(int(turn * 255) & 255))


# --- blur: Pillow's BoxBlur.c ------------------------------------------------------------------


@kernel
def box_radius(sigma):
    """Radius of the box that, applied three times, has the variance of a Gaussian; float32.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering"
    (SSVM 2011), equations 7, 11 and 14.
    """
    variance = F32(F32(sigma) * F32(sigma)) / F32(3)
    length = F32(math.sqrt(12.0 * variance + 1.0))
    whole = F32(math.floor((length - 1.0) / 2.0))
    rest = (F32(2) * whole + F32(1)) * (whole * (whole + F32(1)) - F32(3) * variance)
    rest /= F32(6) * (variance - (whole + F32(1)) * (whole + F32(1)))
    return whole + rest


@kernel
def box_pass(out, source, start, count, step, radius, inner, outer):
    """One box filter along `step`, from element `start` on; 24-bit fixed-point weights."""
    far = (radius + 1) * step
    result = out[start : start + count]
    before, after = source[start - far : start - far + count], source[start + far :]
    middle = source[start : start + count]
    left, right = source[start - step : start - step + count], source[start + step :]
    if radius == 0:
        for q in range(count):
            edges = mul32(add32(before[q], after[q]), outer)
            total = add32(mul32(middle[q], inner), edges)
            result[q] = np.uint8(shift32(add32(total, 1 << 23), 24))
    elif radius == 1:
        for q in range(count):
            edges = mul32(add32(before[q], after[q]), outer)
            total = add32(mul32(add32(middle[q], add32(left[q], right[q])), inner), edges)
            result[q] = np.uint8(shift32(add32(total, 1 << 23), 24))
    else:
        sums = np.zeros(count, np.int32)
        for d in range(-radius, radius + 1):
            shifted = source[start + d * step : start + d * step + count]
            for q in range(count):
                sums[q] = add32(sums[q], shifted[q])
        for q in range(count):
            edges = mul32(add32(before[q], after[q]), outer)
            total = add32(mul32(sums[q], inner), edges)
            result[q] = np.uint8(shift32(add32(total, 1 << 23), 24))


@kernel
def blur(image, channels, size, sigma, a, b):
    """Gaussian blur of planes in place as Pillow's: three box filters along x, three along y.

    Each plane is copied into a frame that repeats its edges, so a filter is one loop over the whole
    plane in either direction.
    """
    exact = box_radius(sigma)
    radius = int(exact)
    inner = int(F32(1 << 24) / (exact * F32(2) + F32(1)))
    outer = ((1 << 24) - (2 * radius + 1) * inner) // 2
    edge = radius + 1
    stride = size + 2 * edge
    first = edge * stride
    for c in range(channels):
        for y in range(size):
            copy(a, first + y * stride + edge, image, (c * size + y) * size, size)
        for _ in range(3):
            for y in range(size):
                place = first + y * stride + edge
                for e in range(edge):
                    a[place - 1 - e] = a[place]
                    a[place + size + e] = a[place + size - 1]
            box_pass(b, a, first + edge, size * stride - 2 * edge, 1, radius, inner, outer)
            a, b = b, a
        for _ in range(3):
            last = first + (size - 1) * stride
            for e in range(edge):
                copy(a, e * stride, a, first, stride)
                copy(a, last + (e + 1) * stride, a, last, stride)
            box_pass(b, a, first, size * stride, stride, radius, inner, outer)
            a, b = b, a
        for y in range(size):
            copy(image, (c * size + y) * size, a, first + y * stride + edge, size)


# --- views --------------------------------------------------------------------------------------


@kernel
def simple_offset(uniform, out_size, size):
    """Start of a SIMPLE_CROP along an axis: -PADDING .. out_size + PADDING - size."""
    return int(uniform * (out_size - size + 2 * PADDING + 1)) - PADDING


@kernel
def shift_reflected(planes, channels, size, down, right, before):
    """Move planes in place, as if the window over the image were `down` and `right` of its place.

    At most one edge of an axis is crossed; beyond it lies the image's reflection (without the edge
    itself). `before`: room for a plane.
    """
    for c in range(channels):
        plane = planes[c * size * size : (c + 1) * size * size]
        copy(before, 0, plane, 0, size * size)
        for y in range(size):
            row = abs(y + down)
            row = 2 * (size - 1) - row if row >= size else row
            for x in range(size):
                column = abs(x + right)
                column = 2 * (size - 1) - column if column >= size else column
                plane[y * size + x] = before[row * size + column]


@kernel
def geometry(view, height, width, draws):
    """The part of an image that a view shows: (box, out_size, window, flip), see `resize`."""
    size = view.size
    if view.kind == RANDOM_CROP:
        box = random_crop(draws, height, width, view.scale, view.log_ratio)
        return box, (size, size), (0, 0, size), draws[D_FLIP] < view.flip
    box = (0, 0, height, width)
    if view.kind == SQUARE:
        return box, (size, size), (0, 0, size), False
    # torchvision's Resize(int) and CenterCrop; Python's round, half to even
    short_side = size if view.kind == SIMPLE_CROP else view.resize
    long_side = int(short_side * max(height, width) / min(height, width))
    out_size = (short_side, long_side) if height <= width else (long_side, short_side)
    if view.kind == SIMPLE_CROP:
        top = min(max(simple_offset(draws[D_TOP], out_size[0], size), 0), out_size[0] - size)
        left = min(max(simple_offset(draws[D_LEFT], out_size[1], size), 0), out_size[1] - size)
        return box, out_size, (top, left, size), draws[D_FLIP] < view.flip
    top, left = round((out_size[0] - size) / 2), round((out_size[1] - size) / 2)
    return box, out_size, (top, left, size), False


@kernel
def render_view(planes, work, channels, height, width, view, key):
    """Write one view of the decoded image into `planes`, (channels, size, size) uint8."""
    draws = work.draws
    draw(draws, key)
    box, out_size, window, flip = geometry(view, height, width, draws)
    resize(planes, work, channels, width, box, out_size, window, view.filter, flip)
    if view.kind == CENTER_CROP or view.kind == SQUARE:
        return
    if view.kind == SIMPLE_CROP:
        down = simple_offset(draws[D_TOP], out_size[0], view.size) - window[0]
        right = simple_offset(draws[D_LEFT], out_size[1], view.size) - window[1]
        if down != 0 or right != 0:
            shift_reflected(
                planes, channels, view.size, down, -right if flip else right, work.blurred_a
            )
    sigma = view.sigma[0] + (view.sigma[1] - view.sigma[0]) * draws[D_SIGMA]
    if view.one_of:
        chosen = int(3 * draws[D_ONE_OF])
        if chosen == 0 and channels == 3:
            grayscale(planes)
        elif chosen == 1:
            solarize(planes)
        elif chosen == 2:
            blur(planes, channels, view.size, sigma, work.blurred_a, work.blurred_b)
    if draws[D_JITTER] < view.jitter:
        jitter(planes, channels, view, draws)
    if view.one_of:
        return
    if channels == 3 and draws[D_GRAYSCALE] < view.grayscale:
        grayscale(planes)
    if draws[D_BLUR] < view.blur:
        blur(planes, channels, view.size, sigma, work.blurred_a, work.blurred_b)
    if draws[D_SOLARIZE] < view.solarize:
        solarize(planes)


@kernel
def normalise(out, planes, channels, scale, shift):
    """out = planes * scale + shift per channel, as float32."""
    n = planes.size // channels
    for c in range(channels):
        source, factor, offset = planes[c * n : (c + 1) * n], scale[c], shift[c]
        target = out[c * n : (c + 1) * n]
        for q in range(n):
            target[q] = F32(source[q]) * factor + offset


@kernel
def decode(work, decoder, stored, height, width, mode, channels):
    """Decode an image into `work.pixels`, (height, width, channels); returns its status."""
    if mode == 1:
        copy(work.pixels, 0, stored, 0, stored.size)
        return OK
    source, header = stored.ctypes.data, work.header
    at = header.ctypes.data
    failed = tj_header(decoder, source, stored.size, at, at + 4, at + 8, at + 12) != 0
    if failed and tj_error_code(decoder) != TJERR_WARNING:
        return CORRUPT
    if header[0] != width or header[1] != height or channels != 3:
        return WRONG_SIZE
    target = work.pixels.ctypes.data
    if tj_decompress(
        decoder, source, stored.size, target, width, 0, height, TJPF_RGB, TJFLAG_ACCURATEDCT
    ):
        if tj_error_code(decoder) != TJERR_WARNING:
            return CORRUPT
        # "Premature end of JPEG file", for which Pillow raises; "Corrupt JPEG data: 12 extraneous
        # bytes", after which the image is whole; "Corrupt JPEG data: bad Huffman code" and others
        text = tj_error_text(decoder)
        if byte_at(text) == 80:
            return TRUNCATED
        digit = byte_at(text + 19) if byte_at(text) == 67 else 0
        return DAMAGED if 48 <= digit <= 57 else CORRUPT
    return OK


@kernel
def render(
    data, pointers, sizes, heights, widths, modes, channels, slots, indices, keys, views, offsets,
    scale, shift, floats, out, status, counter,
):  # fmt: skip
    """Decode images and write all their views; any number of threads may share one batch.

    Args:
        data, pointers, sizes, heights, widths, modes, channels: the file, see `Beton`.
        slots: the places of the batch to fill, (m,) int64.
        indices: image of each place, (n,) int64.
        keys: random key of each place, (n,) uint64.
        views: (v,) VIEW.
        offsets: byte of `out` where view v of all images begins; place b follows b views later.
        scale, shift: (channels,) float32 for `normalise`.
        floats: whether `out` takes normalised float32, or bytes.
        out: the batch, uint8.
        status: of each place, (n,) uint8; written.
        counter: (1,) int64, 0 at first; shared by the threads of one batch.
    """
    max_pixels, max_height, max_width = np.int64(0), np.int64(0), np.int64(0)
    for slot in slots:
        height, width = np.int64(heights[indices[slot]]), np.int64(widths[indices[slot]])
        max_pixels = max(max_pixels, height * width)
        max_height, max_width = max(max_height, height), max(max_width, width)
    work = make_scratch(views, channels, max_pixels, max_height, max_width)
    bytes_per_value = 4 if floats else 1
    decoder = tj_init()
    while True:
        turn = take_next(counter)
        if turn >= slots.size:
            break
        slot = slots[turn]
        index = indices[slot]
        height, width = int(heights[index]), int(widths[index])
        stored = data[pointers[index] : pointers[index] + sizes[index]]
        status[slot] = decode(work, decoder, stored, height, width, modes[index], channels)
        if status[slot] != OK:  # an error in a header leaves the decoder unusable
            tj_destroy(decoder)
            decoder = tj_init()
        if status[slot] > DAMAGED:
            continue
        for v in range(views.size):
            view = views[v]
            count = channels * view.size * view.size
            start = offsets[v] + slot * count * bytes_per_value
            target = out[start : start + count * bytes_per_value]
            key = mix64(keys[slot] ^ mix64(U64(v + 1)))
            if floats:
                planes = work.planes[:count]
                render_view(planes, work, channels, height, width, view, key)
                normalise(target.view(np.float32), planes, channels, scale, shift)
            else:
                render_view(target, work, channels, height, width, view, key)
    tj_destroy(decoder)
