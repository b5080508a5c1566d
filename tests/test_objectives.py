"The seam between encoders and what is learned: anybody's own objective fits in, and what is wrong with one is said."
import sys

import pytest
from conftest import one_sentence
from test_pretraining import corpus

from cmcgns.model import CMCGNS, CMCGNSConfig, Method, build_model, load_model, make_config, next_stage, replace_fields
from cmcgns.objectives import OBJECTIVES, find_objective, objective_code
from cmcgns.pretraining import make_settings, pretrain

SMALL = dict(width=32, clusters=4, cluster_start=1.1)


def test_every_name_of_the_library_is_an_objective():
    for name in OBJECTIVES:
        assert objective_code(name) == {} and find_objective(name).__name__


OWN = """
import torch
from cmcgns.objectives import Objective

class Toy(Objective):
    reads = 'image.whole', 'report.whole'

    def __init__(self, config, grid, push=1.):
        super().__init__(config, grid)
        self.shift = torch.nn.Parameter(torch.zeros(config.width))
        self.register_buffer('steps', torch.tensor(0))
        self.weights = dict(push=push)

    def losses(self, image, report):
        if self.training: self.steps += 1
        similar = (image.whole + self.shift) @ report.whole.T
        return dict(pull=-similar.diagonal().mean(), push=similar.logsumexp(1).mean())
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield "my_method.Toy"
    sys.modules.pop("my_method", None)


def test_an_objective_in_a_module_is_trained_saved_found_and_missed(own, tmp_path, monkeypatch):
    settings = make_settings("tiny", stage1_epochs=1, stage2_epochs=1, objective=own, objective_options="push=0.5")
    model, logs = pretrain(settings, corpus(32), corpus(8, 1), tmp_path / "run")
    row = next(r for r in logs["stage2"] if "eval_loss" in r)
    assert row["eval_loss"] == pytest.approx(row["eval_pull_loss"] + .5 * row["eval_push_loss"], abs=1e-5)
    assert model.objective.steps == 4 and model.objective.shift.any() and model.config.stage == 2 # 2 steps an epoch, counted through both stages
    first = objective_code(own)
    module = tmp_path / "modules" / "my_method.py"
    module.write_text(OWN.replace("-similar.diagonal", "-2 * similar.diagonal"))
    sys.modules.pop("my_method")
    assert objective_code(own) != first
    sys.modules.pop("my_method")
    module.unlink()
    with pytest.raises(ValueError, match="the objective 'my_method.Toy' cannot be found .No module named 'my_method'.: define it in this notebook, or put its module's folder on PYTHONPATH") as error:
        load_model(tmp_path / "run" / "stage2" / "model")
    assert one_sentence(error).startswith(str(tmp_path / "run" / "stage2" / "model")) and "damaged" not in str(error.value) and "PYTHONPATH=." in str(error.value)


def test_what_is_wrong_with_an_objective_is_said_before_training(own, tmp_path):
    for change, said in [(dict(objective="my_method.Tyo"), "'my_method.Tyo' cannot be found"), (dict(objective=own, objective_options="pull=2"), "unknown option 'pull' of Toy: known are push"),
                         (dict(objective=own, objective_options="push=hard"), "push=hard: expected float"), (dict(objective="torch.nn.Linear"), "is no objective")]:
        with pytest.raises(ValueError, match=said):
            pretrain(make_settings("tiny", **change), corpus(32), corpus(8, 1), tmp_path)
    assert not list(tmp_path.glob("stage*"))
    with pytest.raises(ValueError, match="'my_method.Tyo' cannot be found"):
        CMCGNS(CMCGNSConfig.from_dict(make_config("resnet-tiny", "bert-tiny", 50, 64, Method(**SMALL)).to_dict() | dict(objective="my_method.Tyo")))


def test_stage_2_refuses_a_stage_1_of_another_objective():
    model = build_model("resnet-tiny", "bert-tiny", 50, 64, replace_fields(Method(**SMALL), objective="gloria"))
    model.config.objective = "mgca"
    with pytest.raises(ValueError, match="stage 1 does not fit stage 2: other."):
        next_stage(model)
