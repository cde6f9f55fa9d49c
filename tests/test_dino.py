"""The method against naive float64 versions written from the paper's equations."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from ssl_xcit.dino.head import DINOHead
from ssl_xcit.dino.loss import DINOLoss, teacher_probs
from ssl_xcit.dino.networks import MultiCropWrapper
from ssl_xcit.dino.teacher import update_teacher
from ssl_xcit.models.xcit import XCiT

# -- head ----------------------------------------------------------------------------------------


def naive_head(x, state):
    """A three-layer head in float64, with the last layer one prototype at a time."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x = x.double()
    for layer in (0, 2, 4):
        x = x @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        if layer < 4:
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = x / x.square().sum(1, keepdim=True).sqrt()
    logits = []
    for g, v in zip(state["last_layer.weight_g"], state["last_layer.weight_v"], strict=True):
        logits.append(x @ v * g / v.square().sum().sqrt())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_is_mlp_normalisation_and_weight_normed_prototypes(norm_last_layer):
    torch.manual_seed(0)
    head = DINOHead(7, 11, norm_last_layer=norm_last_layer, hidden_dim=13, bottleneck_dim=5)
    for p in head.parameters():  # randomise biases and norms too
        nn.init.normal_(p)
    x = torch.randn(6, 7)
    torch.testing.assert_close(
        head(x).double(), naive_head(x, head.state_dict()), rtol=1e-5, atol=1e-5
    )


def test_last_layer_is_torchs_deprecated_weight_norm_in_values_gradients_and_keys():
    torch.manual_seed(0)
    ours = DINOHead(4, 9, norm_last_layer=False, bottleneck_dim=6).last_layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.utils.weight_norm(nn.Linear(6, 9, bias=False))
    nn.init.normal_(ours.weight_g)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(3, 6)
    upstream = torch.randn(3, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).backward(upstream)
    theirs(x).backward(upstream)
    torch.testing.assert_close(ours.weight_g.grad, theirs.weight_g.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.weight_v.grad)


@pytest.mark.parametrize(
    ("nlayers", "use_bn", "linears", "norms"),
    [
        (3, False, ["mlp.0", "mlp.2", "mlp.4"], []),
        (3, True, ["mlp.0", "mlp.3", "mlp.6"], ["mlp.1", "mlp.4"]),
        (2, False, ["mlp.0", "mlp.2"], []),
        (1, False, ["mlp"], []),
        (1, True, ["mlp"], []),
    ],
)
def test_head_has_the_official_keys(nlayers, use_bn, linears, norms):
    head = DINOHead(4, 6, use_bn=use_bn, nlayers=nlayers, hidden_dim=8, bottleneck_dim=5)
    expected = {f"{name}.{leaf}" for name in linears + norms for leaf in ("weight", "bias")}
    expected |= {
        f"{name}.{leaf}"
        for name in norms
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }
    expected |= {"last_layer.weight_g", "last_layer.weight_v"}
    assert set(head.state_dict()) == expected
    assert head(torch.randn(3, 4)).shape == (3, 6)
    assert sum(isinstance(m, nn.GELU) for m in head.modules()) == nlayers - 1


@pytest.mark.parametrize(("in_dim", "count"), [(384, 22_352_128), (512, 22_614_272)])
def test_head_has_the_official_number_of_parameters(in_dim, count):
    with torch.device("meta"):
        head = DINOHead(in_dim, 65536)
    assert sum(p.numel() for p in head.parameters()) == count
    assert sum(p.numel() for p in head.parameters() if p.requires_grad) == count - 65536
    assert head.last_layer.weight_v.shape == (65536, 256)


def test_head_initialisation():
    torch.manual_seed(0)
    head = DINOHead(64, 512)
    for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert layer.weight.abs().max() > 0.06  # not truncated at a few standard deviations
        assert (layer.bias == 0).all()
    bound = 1 / math.sqrt(256)  # nn.Linear's uniform initialisation
    v = head.last_layer.weight_v
    assert bound * 0.999 < v.abs().max() <= bound
    assert v.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert (head.last_layer.weight_g == 1).all()
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(64, 512, norm_last_layer=False).last_layer.weight_g.requires_grad


def test_head_normalises_in_float32_under_autocast_and_at_any_scale():
    torch.manual_seed(0)
    head = DINOHead(8, 6, hidden_dim=16, bottleneck_dim=4)
    seen = []
    head.last_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
        head(1e-4 * x)
    assert logits.dtype == torch.float32  # from bfloat16 products
    for normalised in seen:
        assert normalised.dtype == torch.float32
        torch.testing.assert_close(normalised.norm(dim=1), torch.ones(5), rtol=1e-6, atol=0)
    assert (logits.abs() <= 1.01).all()  # cosines


# -- multi-crop ----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A backbone for images of several resolutions that records its calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls = []

    def forward(self, x, keys=None):
        self.calls.append(([tuple(images.shape) for images in x], keys))
        return torch.cat([self.conv(images).mean((2, 3)) for images in x])


def test_wrapper_runs_backbone_and_head_once_in_view_order():
    torch.manual_seed(0)
    backbone, head = Pooled(), nn.Linear(4, 5)
    heads = []
    head.register_forward_hook(lambda *call: heads.append(call))
    global_crops, local_crops = torch.randn(2, 3, 3, 16, 16), torch.randn(4, 3, 3, 8, 10)
    keys = [torch.arange(6).view(2, 3), torch.arange(100, 112).view(4, 3)]
    logits = MultiCropWrapper(backbone, head)([global_crops, local_crops], keys)
    ((shapes, given),) = backbone.calls
    assert shapes == [(6, 3, 16, 16), (12, 3, 8, 10)]
    assert [streams.tolist() for streams in given] == [list(range(6)), list(range(100, 112))]
    assert len(heads) == 1
    views = [*global_crops, *local_crops]
    expected = torch.cat([head(backbone([view])) for view in views])  # view by view
    torch.testing.assert_close(logits, expected)


def test_wrapper_passes_no_keys_when_it_has_none():
    backbone = Pooled()
    wrapper = MultiCropWrapper(backbone, nn.Identity())
    logits = wrapper([torch.randn(2, 3, 3, 8, 8)])
    assert logits.shape == (6, 4)
    assert backbone.calls == [([(6, 3, 8, 8)], None)]


def small_student(drop_path_rate=0.0):
    torch.manual_seed(0)
    backbone = XCiT(
        8, 24, 2, 2, eta=1.0, tokens_norm=True, num_classes=0, drop_path_rate=drop_path_rate
    )
    return MultiCropWrapper(backbone, DINOHead(24, 16, hidden_dim=32, bottleneck_dim=8))


def test_wrapper_over_xcit_equals_each_view_alone_in_eval_mode():
    student = small_student().eval()
    crops = [torch.randn(2, 2, 3, 32, 32), torch.randn(3, 2, 3, 16, 16)]
    expected = [student.head(student.backbone(view)) for views in crops for view in views]
    torch.testing.assert_close(student(crops), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_wrapper_passes_drop_path_keys_to_xcit():
    student = small_student(drop_path_rate=0.5).train()
    crops = [torch.randn(2, 2, 3, 32, 32), torch.randn(3, 2, 3, 16, 16)]
    keys = [torch.arange(4).view(2, 2), torch.arange(4, 10).view(3, 2)]
    first, again = student(crops, keys), student(crops, keys)
    other = student(crops, [k + 1000 for k in keys])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# -- loss ----------------------------------------------------------------------------------------


def naive_loss(student, teacher, center, student_temp, teacher_temp):
    """Mean of the 2 V - 2 terms, one sample and one pair of views at a time.

    student (v, n, k), teacher (2, n, k), center (k,): float64.
    """
    terms = []
    for t in range(2):
        for v in range(len(student)):
            if v == t:
                continue
            term = 0.0
            for b in range(teacher.shape[1]):
                z = (teacher[t, b] - center) / teacher_temp
                q = (z - z.max()).exp()
                q = q / q.sum()
                s = student[v, b] / student_temp
                log_p = s - s.max() - (s - s.max()).exp().sum().log()
                term = term - (q * log_p).sum()
            terms.append(term / teacher.shape[1])
    assert len(terms) == 2 * len(student) - 2  # 18 of them with 8 local crops
    return sum(terms) / len(terms)


def logits_of(n, local, k, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(2 + local, n, k, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    center = 0.5 * torch.randn(1, k, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), center.to(dtype)


def loss_with(center, student_temp=0.1):
    loss = DINOLoss(center.shape[1], student_temp).to(center.dtype)
    loss.center.copy_(center)
    return loss


@pytest.mark.parametrize("local", [0, 1, 2, 8, 10])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("student_temp", "teacher_temp"), [(0.1, 0.04), (0.1, 0.07), (0.5, 1.0)])
def test_loss_and_gradient_equal_the_naive_loop(n, local, student_temp, teacher_temp):
    student, teacher, center = logits_of(n, local, 13)
    reference = student.double().requires_grad_()
    expected = naive_loss(
        reference, teacher.double(), center[0].double(), student_temp, teacher_temp
    )
    expected.backward()
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss_with(center, student_temp)(
        student.flatten(0, 1), teacher.flatten(0, 1), teacher_temp
    )
    value.backward()
    assert value.dtype == torch.float32
    assert teacher.grad is None
    torch.testing.assert_close(value.double(), expected.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("local", [1, 8])
def test_parts_of_the_views_add_up_to_the_naive_loop(local):
    student, teacher, center = logits_of(3, local, 13, torch.float64)
    expected = naive_loss(student.requires_grad_(), teacher, center[0], 0.1, 0.04)
    (gradient,) = torch.autograd.grad(expected, student)
    loss, found = loss_with(center), []
    for views in (range(2), range(2, 2 + local)):
        part = student[views.start : views.stop].detach().flatten(0, 1).requires_grad_()
        value = loss(part, teacher.flatten(0, 1), 0.04, views, 2 + local)
        found.append((value.detach(), *torch.autograd.grad(value, part)))
    values, gradients = zip(*found, strict=True)
    torch.testing.assert_close(sum(values), expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat(gradients), gradient.flatten(0, 1), rtol=1e-10, atol=1e-12)


def test_loss_equals_the_naive_loop_to_float64_precision():
    student, teacher, center = logits_of(3, 8, 50, torch.float64)
    value = loss_with(center)(student.flatten(0, 1), teacher.flatten(0, 1), 0.04)
    expected = naive_loss(student, teacher, center[0], 0.1, 0.04)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("local", [0, 2])
def test_loss_passes_gradcheck(local):
    student, teacher, center = logits_of(2, local, 4, torch.float64, scale=0.2)
    loss = loss_with(center)
    student = student.flatten(0, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.flatten(0, 1), 0.07), student)


def test_the_loss_pairs_only_different_views_of_the_same_image():
    # Both networks are certain of view v's own prototype, so only pairs v == t would cost nothing.
    student = torch.full((2, 1, 2), -50.0)
    student[0, 0, 0] = student[1, 0, 1] = 50.0
    value = DINOLoss(2, student_temp=1.0)(student.flatten(0, 1), student.flatten(0, 1), 1.0)
    assert value.item() == pytest.approx(100.0)


@pytest.mark.parametrize("k", [16, 65536])
def test_uniform_outputs_cost_log_of_the_number_of_prototypes(k):
    value = DINOLoss(k)(torch.zeros(8, k), torch.zeros(4, k), 0.04)
    assert value.item() == pytest.approx(math.log(k), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_and_accurate_from_half_precision_logits_under_autocast(dtype):
    student, teacher, center = logits_of(4, 8, 2048, dtype, scale=0.3)
    expected = naive_loss(student.double(), teacher.double(), center[0].double(), 0.1, 0.04)
    student = student.flatten(0, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss_with(center.float())(student, teacher.flatten(0, 1), 0.04)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    value.backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_loss_and_gradient_stay_finite_for_large_logits(scale):
    student, teacher, center = logits_of(2, 2, 8, scale=scale)
    expected = naive_loss(student.double(), teacher.double(), center[0].double(), 0.1, 0.04)
    student.requires_grad_()
    value = loss_with(center)(student.flatten(0, 1), teacher.flatten(0, 1), 0.04)
    value.backward()
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


def test_loss_uses_the_previous_centre_and_leaves_it_alone():
    student, teacher, center = logits_of(3, 2, 7)
    loss = loss_with(center)
    args = (student.flatten(0, 1), teacher.flatten(0, 1), 0.04)
    first = loss(*args)
    assert torch.equal(loss.center, center)
    assert torch.equal(loss(*args), first)
    loss.update_center(teacher.flatten(0, 1).mean(0, keepdim=True))
    assert not torch.equal(loss(*args), first)


def test_centre_is_the_moving_average_of_raw_teacher_logits():
    loss = DINOLoss(5, center_momentum=0.9)
    assert (loss.center == 0).all()
    expected = torch.zeros(5, dtype=torch.float64)
    for step in range(4):
        logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        for k in range(5):
            batch = sum(logits[b, k].double() for b in range(6)) / 6
            expected[k] = 0.9 * expected[k] + 0.1 * batch
        loss.update_center(logits.mean(0, keepdim=True))
    torch.testing.assert_close(loss.center[0].double(), expected, rtol=1e-5, atol=1e-7)
    assert list(loss.state_dict()) == ["center"]


def test_subtracting_the_centre_takes_away_the_lead_of_a_dominant_prototype():
    logits = torch.zeros(2, 3)
    logits[:, 0] = 1.0
    center = torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(teacher_probs(logits, center, 0.04), torch.full((2, 3), 1 / 3))


def test_logits_that_are_not_whole_views_are_a_bug():
    loss = DINOLoss(4)
    for student_rows, teacher_rows in ((6, 3), (7, 4), (2, 4)):
        with pytest.raises(AssertionError):
            loss(torch.zeros(student_rows, 4), torch.zeros(teacher_rows, 4), 0.04)


# -- teacher -------------------------------------------------------------------------------------


def test_teacher_after_n_steps_equals_the_closed_form_of_the_moving_average():
    torch.manual_seed(0)
    teacher = nn.Linear(3, 2)
    start = teacher.weight.detach().double().clone()
    students, m = [], 0.9
    for _ in range(6):
        student = nn.Linear(3, 2)
        students.append(student.weight.detach().double())
        update_teacher(student, teacher, m)
    closed = m**6 * start + sum((1 - m) * m ** (5 - i) * s for i, s in enumerate(students))
    torch.testing.assert_close(teacher.weight.detach().double(), closed, rtol=1e-6, atol=1e-7)


def test_momentum_one_keeps_the_teacher_and_zero_copies_the_student():
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    before = copy.deepcopy(teacher.state_dict())
    update_teacher(student, teacher, 1.0)
    assert torch.equal(teacher.weight, before["weight"])
    update_teacher(student, teacher, 0.0)
    assert torch.equal(teacher.weight, student.weight)


def test_teacher_update_changes_every_parameter_and_no_buffer():
    student = small_student()
    student.head.last_layer.weight_g.requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.add_(1)
    before = copy.deepcopy(teacher.state_dict())
    update_teacher(student, teacher, 0.5)
    buffers = {name for name, _ in teacher.named_buffers()}
    assert any(name.endswith("running_mean") for name in buffers)
    for name, tensor in teacher.state_dict().items():
        if name in buffers:
            assert torch.equal(tensor, before[name]), name
        else:
            torch.testing.assert_close(tensor, before[name] + 0.5)


def test_one_training_step_changes_teacher_buffers_only_through_the_teachers_forward_pass():
    student = small_student().train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    global_crops, local_crops = torch.randn(2, 2, 3, 32, 32), torch.randn(2, 2, 3, 16, 16)
    alone = copy.deepcopy(teacher)
    alone([global_crops])
    with torch.no_grad():
        teacher_logits = teacher([global_crops])
    student_logits = student([global_crops, local_crops])
    DINOLoss(16)(student_logits, teacher_logits, 0.04).backward()
    update_teacher(student, teacher, 0.9)
    for (name, ours), (_, expected) in zip(
        teacher.named_buffers(), alone.named_buffers(), strict=True
    ):
        assert torch.equal(ours, expected), name
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
