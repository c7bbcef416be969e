"""A wrong call says what to change: the argument, what was expected, what came."""

import numpy as np
import pytest
import torch

from contrastive_kit import InfoNCE, NegativeQueue, NTXent, SigLIP, SupCon
from contrastive_kit.functional import info_nce, nt_xent, siglip, sup_con
from contrastive_kit.metrics import alignment, effective_rank, uniformity

Z = torch.randn(4, 3)
META = torch.empty(4, 3, device="meta")


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Z, [1.0]), {}, TypeError, r"z2 must be a tensor of shape \(N, D\), got list"),
        ((Z.long(), Z), {}, TypeError, "z1 must hold floating point embeddings, got torch.int64"),
        ((Z, (Z > 0)), {}, TypeError, "z2 must hold floating point embeddings, got torch.bool"),
        ((Z[0], Z[0]), {}, ValueError, r"z1 must have shape \(N, D\), got \(3,\)"),
        ((Z, Z[:3]), {}, ValueError, r"z2 must have the shape of z1, \(4, 3\), got \(3, 3\)"),
        ((Z, Z, Z[:, :2]), {}, ValueError, r"more_views\[0\] must have the shape of z1"),
        ((Z[:, :0], Z[:, :0]), {}, ValueError, r"z1 must have no empty dimension, got .*\(4, 0\)"),
        ((Z[:1], Z[:1]), {}, ValueError, "z1 must have at least 2 rows.*got 1"),
        ((Z, META), {}, ValueError, "z2 must be on the device of z1, cpu, got meta"),
        ((Z, Z), {"temperature": 0}, ValueError, "temperature must be .* above 0, got 0"),
        ((Z, Z), {"temperature": -1.0}, ValueError, "temperature must be .* above 0, got -1.0"),
        ((Z, Z), {"temperature": float("nan")}, ValueError, "temperature must be .* got nan"),
        ((Z, Z), {"temperature": float("inf")}, ValueError, "temperature must be .* got inf"),
        ((Z, Z), {"temperature": 1e-39}, ValueError, "at least 1.2e-07 .*float32, got 1e-39"),
        ((Z.double(), Z), {"temperature": 1e-17}, ValueError, "at least 2.2e-16 .*float64"),
        ((Z, Z), {"temperature": "0.5"}, TypeError, "temperature must be a number, got '0.5'"),
        ((Z, Z), {"temperature": True}, TypeError, "temperature must be a number, got True"),
        ((Z, Z), {"temperature": torch.ones(2)}, ValueError, r"one value, got .*\(2,\)"),
        (
            (Z, Z),
            {"temperature": torch.ones((), device="meta")},
            ValueError,
            "temperature must be on the device of the embeddings, cpu, got meta",
        ),
        ((Z, Z), {"reduction": "avg"}, ValueError, "reduction must be .*'none', got 'avg'"),
        ((Z, Z), {"backend": "cuda"}, ValueError, "backend must be one of 'auto'.*got 'cuda'"),
        ((Z, Z), {"ids": torch.ones(4)}, TypeError, "ids must hold integers, got torch.float32"),
        ((Z, Z), {"ids": torch.arange(4).to(torch.uint16)}, TypeError, "signed .* torch.uint16"),
        ((Z, Z), {"decoupled": "no"}, TypeError, "decoupled must be True or False, got 'no'"),
        ((Z, Z), {"gather_distributed": "no"}, TypeError, "gather_distributed must be True or"),
        ((Z, Z), {"return_stats": 1}, TypeError, "return_stats must be True or False, got 1"),
        ((Z, Z), {"ids": [1, 2, 3, 4]}, TypeError, "ids must be an integer tensor"),
        ((Z, Z), {"ids": torch.arange(8)}, ValueError, r"ids must have shape \(4,\).*got \(8,\)"),
        ((Z, Z), {"ids": META.long()[:, 0]}, ValueError, "ids must be on the device of z1"),
        (
            (Z, Z),
            {"sample_weight": [1.0] * 4},
            TypeError,
            r"sample_weight must be a .* \(4,\), got list",
        ),
        (
            (Z, Z),
            {"sample_weight": torch.arange(4)},
            TypeError,
            r"sample_weight must be .*got torch.int64",
        ),
        (
            (Z, Z),
            {"sample_weight": torch.ones(8)},
            ValueError,
            r"sample_weight must have .*\(4,\).*got \(8,\)",
        ),
        (
            (Z, Z),
            {"sample_weight": META[:, 0]},
            ValueError,
            "sample_weight must be on the device of z1",
        ),
        ((Z, Z), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ((Z, Z), {"label_smoothing": "a"}, TypeError, "label_smoothing must be a number, got 'a'"),
        ((Z, Z), {"hardness": -0.1}, ValueError, "hardness must be a finite number of at least 0"),
        ((Z, Z), {"hardness": 1e300}, ValueError, "hardness must be at most 4.2e.06 .*float32"),
        ((Z, Z), {"hardness": float("inf")}, ValueError, "hardness must be a finite .* got inf"),
        (
            (Z, Z),
            {"hardness": 1.0, "label_smoothing": 0.1},
            ValueError,
            "label_smoothing and hardness cannot be combined: .* set one to 0",
        ),
        ((Z, Z), {"positive_prior": 1.0}, ValueError, "positive_prior must be below 1"),
        ((Z, Z), {"positive_prior": -0.1}, ValueError, "positive_prior must be between 0 and 1"),
        ((Z, Z), {"positive_prior": "a"}, TypeError, "positive_prior must be a number, got 'a'"),
        ((Z, Z), {"margin": 2.5}, ValueError, "margin must be between 0 and 2, got 2.5"),
        ((Z, Z), {"margin": float("nan")}, ValueError, "margin must be between 0 and 2, got nan"),
        (
            (Z, Z),
            {"positive_prior": 0.1, "label_smoothing": 0.1},
            ValueError,
            "label_smoothing and positive_prior cannot be combined: .* set one to 0",
        ),
        (
            (Z, Z),
            {"decoupled": True, "margin": 0.1},
            ValueError,
            "margin needs decoupled=False",
        ),
        (
            (Z, Z),
            {"decoupled": True, "label_smoothing": 0.1},
            ValueError,
            "label_smoothing needs decoupled=False",
        ),
    ],
)
def test_nt_xent(args, options, error, message):
    with pytest.raises(error, match=message):
        nt_xent(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Z, Z[:2]), {}, ValueError, "key must have the shape of query"),
        ((Z.int(), Z), {}, TypeError, "query must hold floating point"),
        ((Z[:1], Z[:1]), {}, ValueError, "query must have at least 2 rows where no negatives"),
        ((Z, Z, Z[:, :2]), {}, ValueError, r"negatives must have shape \(K, 3\).*got \(4, 2\)"),
        (
            (Z, Z, Z.expand(4, 4, 3)[:, :0]),
            {},
            ValueError,
            "negatives must have no empty dimension",
        ),
        ((Z, Z, Z[:0, :2]), {}, ValueError, "negatives must have no empty dimension"),
        ((Z, Z, Z[0]), {}, ValueError, r"negatives must have shape \(N, D\), got \(3,\)"),
        ((Z, Z, Z.expand(2, 4, 3)), {}, ValueError, r"negatives must have shape \(4, K, 3\)"),
        ((Z, Z, META), {}, ValueError, "negatives must be on the device of query"),
        ((Z, Z), {"symmetric": "no"}, TypeError, "symmetric must be True or False, got 'no'"),
        ((Z, Z, Z[None].expand(4, 4, 3)), {"return_stats": "no"}, TypeError, "return_stats must"),
        ((Z, Z), {"temperature": 1e-8}, ValueError, "temperature must be at least 1.2e-07"),
        (
            (Z, Z, Z),
            {"symmetric": True},
            ValueError,
            "symmetric=True with negatives needs",
        ),
        ((Z, Z, Z), {"ids": torch.arange(4)}, ValueError, "with negatives given, omit ids"),
        ((Z, Z), {"ids": torch.arange(3)}, ValueError, r"ids must have shape \(4,\)"),
        ((Z, Z), {"temperature": 0.0}, ValueError, "temperature must be"),
        (
            (Z, Z),
            {"sample_weight": torch.ones(4, 1)},
            ValueError,
            r"sample_weight must have .*got \(4, 1\)",
        ),
        ((Z, Z), {"label_smoothing": float("nan")}, ValueError, "label_smoothing must be .*nan"),
        ((Z, Z), {"hardness": True}, TypeError, "hardness must be a number, got True"),
    ],
)
def test_info_nce(args, options, error, message):
    with pytest.raises(error, match=message):
        info_nce(*args, **options)


LABELS = torch.arange(4) // 2


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((), {"labels": LABELS}, ValueError, "views must be at least one tensor .*got none"),
        (
            (Z, Z[:3]),
            {"labels": LABELS},
            ValueError,
            r"views\[1\] must have the shape of views",
        ),
        ((Z.int(),), {"labels": LABELS}, TypeError, r"views\[0\] must hold floating point"),
        ((Z[:1],), {"labels": LABELS[:1]}, ValueError, r"views\[0\] must have at least 2 rows"),
        ((Z,), {"labels": LABELS.double()}, TypeError, "labels must hold integers"),
        ((Z, Z), {"labels": LABELS.repeat(2)}, ValueError, r"labels must have shape \(4,\)"),
        ((Z,), {"labels": None}, TypeError, "labels must be an integer tensor .* got None"),
        ((Z,), {}, TypeError, "labels must be an integer tensor .* got None; without: nt_xent"),
        ((Z, LABELS), {}, TypeError, r"given by name: pass \(z1, z2, labels=labels\)"),
        (
            (Z[:, None], LABELS),
            {},
            TypeError,
            r"given by name: pass \(\*features.unbind\(1\), labels=labels\)",
        ),
        (
            (torch.stack([Z, Z], 1),),
            {"labels": LABELS},
            ValueError,
            r"got \(4, 2, 3\); features .* passed as \(\*features.unbind\(1\), labels=labels\)",
        ),
        ((Z,), {"labels": LABELS, "variant": "L_in"}, ValueError, "variant must be .*got 'L_in'"),
        ((Z,), {"labels": LABELS, "temperature": 0.0}, ValueError, "temperature must be"),
        (
            (Z,),
            {"labels": LABELS, "sample_weight": Z},
            ValueError,
            r"sample_weight must have shape \(4,\)",
        ),
        ((Z,), {"labels": LABELS, "reduction": ""}, ValueError, "reduction must be"),
        ((Z,), {"labels": LABELS, "backend": ""}, ValueError, "backend must be"),
    ],
)
def test_sup_con(args, options, error, message):
    with pytest.raises(error, match=message):
        sup_con(*args, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((Z, Z[:2]), {}, ValueError, "z2 must have the shape of z1"),
        ((Z, [1.0]), {}, TypeError, "z2 must be a tensor"),
        ((Z, Z), {"temperature": -1}, ValueError, "temperature must be .* above 0, got -1"),
        ((Z, Z), {"logit_bias": "a"}, TypeError, "logit_bias must be a number, got 'a'"),
        ((Z, Z), {"logit_bias": float("nan")}, ValueError, "logit_bias must be finite, got nan"),
        (
            (Z, Z),
            {"logit_bias": torch.zeros(2)},
            ValueError,
            r"logit_bias must be .*one value, got .*\(2,\)",
        ),
        (
            (Z, Z),
            {"logit_bias": META[0, 0]},
            ValueError,
            "logit_bias must be on the device of the embeddings",
        ),
        ((Z, Z), {"ids": torch.arange(3)}, ValueError, r"ids must have shape \(4,\)"),
        (
            (Z, Z),
            {"sample_weight": torch.ones(3)},
            ValueError,
            r"sample_weight must have shape \(4,\)",
        ),
        ((Z, Z), {"reduction": "avg"}, ValueError, "reduction must be"),
        (
            (Z, Z),
            {"backend": "triton"},
            ValueError,
            "'triton' cannot run here: it needs tensors on",
        ),
        (
            (Z, Z),
            {"backend": "triton", "labels": torch.arange(4)},
            ValueError,
            "'triton' cannot run here",
        ),
    ],
)
def test_siglip(args, options, error, message):
    with pytest.raises(error, match=message):
        siglip(*args, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": torch.tensor(0.1)}, TypeError, "both are learnable parameters"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"logit_bias": float("inf")}, ValueError, "logit_bias must be finite"),
        ({"reduction": None}, ValueError, "reduction must be"),
        ({"backend": "triton!"}, ValueError, "backend must be"),
    ],
)
def test_siglip_checks_when_it_is_made(options, error, message):
    with pytest.raises(error, match=message):
        SigLIP(**options)


def test_the_line_that_the_error_for_features_writes_is_right():
    features = torch.stack([Z, Z + 1], 1)
    expected = sup_con(Z, Z + 1, labels=LABELS)
    assert torch.equal(SupCon()(*features.unbind(1), labels=LABELS), expected)
    for call in (lambda: SupCon()(features, LABELS), lambda: SupCon()(features, labels=LABELS)):
        with pytest.raises((TypeError, ValueError), match=r"\*features.unbind\(1\), labels=labels"):
            call()


def test_supcon_checks_its_variant_when_it_is_made():
    with pytest.raises(
        ValueError, match="variant must be one of 'out', 'in', 'pairwise', got 'both'"
    ):
        SupCon(variant="both")


@pytest.mark.parametrize("module", [NTXent, InfoNCE, SupCon])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be"),
        ({"temperature": torch.tensor(0.1)}, TypeError, "see learnable_temperature"),
        ({"temperature": 0.005, "learnable_temperature": True}, ValueError, "at least 0.01"),
        ({"reduction": None}, ValueError, "reduction must be one of"),
        ({"backend": "triton!"}, ValueError, "backend must be one of"),
        ({"unknown": 1}, TypeError, "unexpected keyword argument 'unknown'"),
    ],
)
def test_modules_check_when_they_are_made(module, options, error, message):
    with pytest.raises(error, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        (NTXent, "decoupled"),
        (NTXent, "learnable_temperature"),
        (InfoNCE, "symmetric"),
        (SupCon, "gather_distributed"),
        (SigLIP, "gather_distributed"),
    ],
)
def test_a_flag_is_no_text(module, flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        module(**{flag: "no"})


@pytest.mark.parametrize("module", [NTXent, InfoNCE])
def test_modules_check_their_options_when_they_are_made(module):
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        module(label_smoothing=-0.1)
    with pytest.raises(ValueError, match="cannot be combined"):
        module(hardness=1.0, label_smoothing=0.1)


def test_a_decoupled_module_takes_no_label_smoothing():
    with pytest.raises(ValueError, match="label_smoothing needs decoupled=False"):
        NTXent(decoupled=True, label_smoothing=0.1)


def test_a_temperature_tensor_that_is_not_positive_shows_in_the_loss():
    for bad in (0.0, -0.1, float("nan")):
        assert not nt_xent(Z, Z, temperature=torch.tensor(bad)).isfinite()


@pytest.mark.parametrize("name", ["sparse", "compressed", "nested", "jagged"])
def test_rows_that_are_not_dense_are_refused_with_the_way_out(name):
    rows = {
        "sparse": Z.to_sparse,
        "compressed": Z.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor([Z, Z[:2]]),
        "jagged": lambda: torch.nested.nested_tensor([Z, Z[:2]], layout=torch.jagged),
    }[name]()
    way_out = r"\.to_dense\(\)" if name in ("sparse", "compressed") else r"torch\.cat\("
    for call in (
        lambda x: nt_xent(x, x),
        lambda x: nt_xent(Z, Z, x),
        lambda x: info_nce(Z, x),
        lambda x: info_nce(Z, Z, x),
        lambda x: sup_con(x, labels=LABELS),
        lambda x: siglip(x, x),
        NegativeQueue(3, 4),
        uniformity,
        effective_rank,
    ):
        with pytest.raises(ValueError, match=rf"must be a dense tensor, got .*{way_out}"):
            call(rows)
    if name == "sparse":
        for options in ({"ids": LABELS.to_sparse()}, {"sample_weight": torch.ones(4).to_sparse()}):
            with pytest.raises(ValueError, match=r"must be a dense tensor.*to_dense"):
                nt_xent(Z, Z, **options)


class TestNumbersOfNumPy:
    @pytest.mark.parametrize("number", [np.float64, np.float32, np.float16])
    def test_are_taken_as_those_of_python(self, number):
        half, quarter = number(0.5), number(0.25)
        options = {"label_smoothing": 0.25, "reduction": "sum"}
        expected = nt_xent(Z, Z.flip(0), temperature=0.5, **options)
        options["label_smoothing"] = quarter
        assert torch.equal(nt_xent(Z, Z.flip(0), temperature=half, **options), expected)
        expected = info_nce(Z, Z.flip(0), temperature=0.5, hardness=0.25)
        assert torch.equal(info_nce(Z, Z.flip(0), temperature=half, hardness=quarter), expected)
        expected = sup_con(Z, labels=LABELS, temperature=0.5)
        assert torch.equal(sup_con(Z, labels=LABELS, temperature=half), expected)
        expected = siglip(Z, Z, temperature=0.5, logit_bias=-0.25)
        assert torch.equal(siglip(Z, Z, temperature=half, logit_bias=-quarter), expected)
        for make in (
            lambda t, x: NTXent(t, hardness=x),
            lambda t, x: InfoNCE(t, learnable_temperature=True, label_smoothing=x),
            lambda t, x: SupCon(t),
            lambda t, x: SigLIP(t, x, max_scale=1 / t),
        ):
            assert repr(make(half, quarter)) == repr(make(0.5, 0.25))
        assert torch.equal(alignment(Z, -Z, alpha=half), alignment(Z, -Z, alpha=0.5))
        assert torch.equal(uniformity(Z, t=half), uniformity(Z, t=0.5))

    def test_integers_are_numbers_too(self):
        assert torch.equal(nt_xent(Z, Z, temperature=np.int64(1)), nt_xent(Z, Z, temperature=1.0))

    @pytest.mark.parametrize("wrong", [True, np.True_, "0.5", None, np.ones(1), 1j])
    def test_what_is_no_number_is_refused(self, wrong):
        for call in (
            lambda x: nt_xent(Z, Z, temperature=x),
            lambda x: nt_xent(Z, Z, hardness=x),
            lambda x: siglip(Z, Z, logit_bias=x),
            lambda x: SigLIP(max_scale=x),
            NTXent,
            lambda x: uniformity(Z, t=x),
        ):
            with pytest.raises(TypeError, match="must be a number, got"):
                call(wrong)
