"""What is computed once while parameters stay is what each forward would compute."""

import threading

import torch

from licq.quant import unchanged
from licq.quant.config import QuantConfig
from licq.quant.model import QuantModel
from licq.reconstruction.state import knob_of, learned
from tests.tiny_codecs import images, tiny_codec


def observed() -> tuple[QuantModel, torch.Tensor]:
    x = images(2, 64)
    qmodel = QuantModel(tiny_codec("lu2022"), QuantConfig())
    qmodel.observe([x])
    qmodel.quantize_nodes(True)
    return qmodel, x


def test_forwards_are_equal_while_nothing_changes_and_follow_a_change_behind_it():
    qmodel, x = observed()
    with torch.no_grad():
        expected = qmodel(x)["x_hat"]
        with unchanged.everything():
            assert torch.equal(qmodel(x)["x_hat"], expected) and torch.equal(qmodel(x)["x_hat"], expected)
        for key, parameter in learned(qmodel.nodes).items():
            if knob_of(key) in ("range_w", "range_a"):
                parameter.sub_(0.7)
        changed = qmodel(x)["x_hat"]
        assert not torch.equal(changed, expected)
        with unchanged.everything():
            assert torch.equal(qmodel(x)["x_hat"], changed)


def test_a_learned_parameter_changes_while_the_others_are_taken_as_constant():
    qmodel, x = observed()
    active = {key: p for key, p in learned(qmodel.nodes).items() if knob_of(key) in ("range_w", "bias")}

    def learn() -> tuple[list[torch.Tensor], torch.Tensor]:
        values = {key: p.detach().clone() for key, p in active.items()}
        gradients = []
        for _ in range(2):
            for parameter in active.values():
                parameter.grad = None
                parameter.requires_grad_(True)
            qmodel(x)["x_hat"].square().mean().backward()
            gradients += [p.grad.clone() for p in active.values()]
            with torch.no_grad():
                for parameter in active.values():
                    parameter.sub_(parameter.grad.sign() * 0.05)
        with torch.no_grad(), unchanged.everything():
            end = qmodel(x)["x_hat"]
        with torch.no_grad():
            for key, parameter in active.items():
                parameter.copy_(values[key]).requires_grad_(False)
        return gradients, end

    gradients, end = learn()
    with unchanged.constants():
        again, same_end = learn()
    assert all(torch.equal(a, b) for a, b in zip(gradients, again)) and torch.equal(end, same_end)


def test_only_what_is_kept_itself_is_remembered_and_other_threads_have_a_memory_of_their_own():
    qmodel, x = observed()
    parameters = learned(qmodel.nodes)
    with unchanged.constants():
        kept = unchanged.memory()
        assert kept is not None
        sizes = []
        for _ in range(3):
            for key, parameter in parameters.items():
                if knob_of(key) == "range_a":
                    parameter.requires_grad_(True)
            qmodel(x)
            sizes.append(len(kept))
        assert sizes[0] == sizes[2]
        others = []
        thread = threading.Thread(target=lambda: others.append(unchanged.memory()))
        thread.start()
        thread.join()
        assert others == [None]
    assert unchanged.memory() is None
