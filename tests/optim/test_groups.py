"""Which parameter goes where, and that a step is torch's own step."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optim.groups import AdamWSettings, MuonSettings, build_optimizer, decays, is_hidden_matrix

ADAMW = AdamWSettings(learning_rate=1e-2)
MUON = MuonSettings(learning_rate=1e-2, adamw_learning_rate=2e-3)


class Tiny(nn.Module):
    """One parameter of every sort that a model here has; the head is tied to the embedding where asked."""

    def __init__(self, is_tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.query = nn.Linear(8, 8, bias=True)
        self.router = nn.Linear(8, 3, bias=False)
        self.experts = nn.ParameterDict({"gate_up": torch.randn(3, 8, 8), "down": torch.randn(3, 8, 4)})
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.norm(self.query(self.embedding(ids)))
        gate, up = torch.einsum("nd,ejd->enj", x, self.experts["gate_up"]).chunk(2, dim=-1)
        x = x + torch.einsum("ne,enf,edf->nd", self.router(x).softmax(-1), gate * up, self.experts["down"])
        return self.head(x)


def train(model, optimizer, steps=4):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randint(11, (20,))), torch.randint(11, (20,))).backward()
        optimizer.step()


def names(model, parameters):
    held = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.kind)
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(settings, is_tied):
    model = Tiny(is_tied)
    held = [id(parameter) for group in build_optimizer(model, settings).param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_norms_biases_and_embeddings_do_not_decay():
    model = Tiny()
    kept = {name for name, parameter in model.named_parameters() if not decays(name, parameter)}
    assert kept == {"embedding.weight", "query.bias", "norm.weight"}
    for group in build_optimizer(model, ADAMW).param_groups:
        assert group["weight_decay"] == (0.0 if names(model, group["params"]) == kept else 0.1)


def test_muon_takes_hidden_matrices_only():
    model = Tiny()
    muon, adamw = build_optimizer(model, MUON).optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert names(model, muon.param_groups[0]["params"]) == {"query.weight"}
    weight = torch.zeros(4, 4)
    taken = ["layers.0.attention.output.weight", "layers.3.feed_forward.shared.gate_up.weight"]
    left = ["embedding.weight", "model.embed_tokens.weight", "head.weight", "layers.0.feed_forward.router.weight"]
    assert all(is_hidden_matrix(name, weight) for name in taken)
    assert not any(is_hidden_matrix(name, weight) for name in left)
    assert not is_hidden_matrix("layers.0.feed_forward.experts.down", torch.zeros(2, 4, 4))


def test_adamw_equals_torchs_step_for_step():
    ours, theirs = Tiny(), Tiny()
    optimizer = build_optimizer(ours, ADAMW)
    no_decay = [theirs.embedding.weight, theirs.query.bias, theirs.norm.weight]
    rest = [p for p in theirs.parameters() if not any(p is other for other in no_decay)]
    plain = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    for _ in range(4):
        train(ours, optimizer, steps=1)
        train(theirs, plain, steps=1)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_adamw_is_fused_on_the_cpu():
    assert all(group["fused"] for group in build_optimizer(Tiny(), ADAMW).param_groups)


def test_learning_rate_is_set_for_all_groups_and_keeps_their_ratio():
    optimizer = build_optimizer(Tiny(), MUON)
    optimizer.set_learning_rate(1e-3)
    assert [group["lr"] for group in optimizer.optimizers[0].param_groups] == pytest.approx([1e-3])
    assert [group["lr"] for group in optimizer.optimizers[1].param_groups] == pytest.approx([2e-4, 2e-4])
    assert optimizer.learning_rate == 1e-3
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    still = build_optimizer(model, MUON)
    still.set_learning_rate(0.0)
    train(model, still)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.kind)
def test_training_reduces_the_loss(settings):
    model = Tiny()
    ids = torch.arange(11)
    optimizer = build_optimizer(model, settings)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.parameters, optimizer.clip)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.kind)
@pytest.mark.parametrize("through", ["checkpoint", "state_dict"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(settings, through):
    unbroken = Tiny()
    optimizer = build_optimizer(unbroken, settings)
    train(unbroken, optimizer)
    resumed = copy.deepcopy(unbroken)
    second = build_optimizer(resumed, settings)
    if through == "checkpoint":
        state = get_optimizer_state_dict(unbroken, list(optimizer.optimizers))
        assert "query.weight" in state["state"] and "experts.gate_up" in state["state"]
        set_optimizer_state_dict(resumed, list(second.optimizers), copy.deepcopy(state))
    else:
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.set_learning_rate(settings.learning_rate)
    train(unbroken, optimizer)
    train(resumed, second)
    for mine, other in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(mine, other)
