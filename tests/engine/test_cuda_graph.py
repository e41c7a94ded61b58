"""Captured passes: recorded on the CPU they equal eager ones, and on a fake GPU every operation can be captured."""

import copy
import json
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

import finetune
import train
from engine import cuda_graph, session
from engine.cuda_graph import CapturedPasses, GraphedForward
from engine.session import Session
from model import EncoderConfig, HeadConfig, SimCLR, create_encoder, encoder_spec, feature_dim, projection_head
from presets import FINETUNE, PRETRAIN, parse
from tests.fake_cuda import fake_cuda
from tests.recorded_graph import graphs_on_the_cpu
from tests.small_sets import texture_shards


class Net(nn.Module):
    """Batch norm, dropout and a second output outside of autocast, or None, as SimCLR has them."""

    def __init__(self, classes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(8 * 16, 5)
        self.probe = nn.Linear(8 * 16, classes) if classes else None
        self.unused, self.scale = nn.Linear(2, 2), 1.0

    def forward(self, views):
        h = self.encoder(views) * self.scale
        with torch.autocast(h.device.type, enabled=False):
            return self.head(h.float()), self.probe and self.probe(h.detach().float())


def train_steps(net, steps=4, size=6):
    """Outputs of every step and the final state, in bfloat16."""
    outputs, random = [], torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            z, logits = net(torch.randn(4, 3, size, size, generator=random))
        outputs.append((z.detach().clone(), logits is None))
        (z.square().mean() + (0 if logits is None else logits.logsumexp(1).mean())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs, copy.deepcopy(net.state_dict())


@pytest.mark.parametrize(("classes", "compiled"), [(3, False), (0, False), (3, True)])
def test_replayed_steps_equal_eager_ones(monkeypatch, classes, compiled):
    """Bit for bit: new views are copied, weights cast again, buffers updated once per step, dropout is drawn again."""
    torch.manual_seed(0)
    net = Net(classes)
    initial = copy.deepcopy(net.state_dict())
    if compiled:
        net.forward = torch.compile(net.forward, backend="aot_eager")
    expected = train_steps(net)
    net.load_state_dict(initial)
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch) as graphs:
        actual = train_steps(net)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [graph.replays for graph in graphs] == [4, 4] and min(len(graph.calls) for graph in graphs) > 8


def test_gradients_are_not_copied(monkeypatch):
    net = Net(3)
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch):
        z, logits = net(torch.randn(4, 3, 6, 6))
        (z.sum() + logits.sum()).backward()
    passes = net.forward.passes
    for parameter, gradient in zip(passes.parameters, passes.gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or parameter.grad.data_ptr() == gradient.data_ptr()
    assert passes.gradients[-1] is None, "of the unused layer"


def test_views_of_another_size_are_captured_again(monkeypatch):
    """The steps equal eager ones bit for bit, and the first size's graphs are gone: each size comes once in a run."""
    torch.manual_seed(0)
    net = Net(3)
    net.encoder[3] = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    initial = copy.deepcopy(net.state_dict())

    def steps():
        return [train_steps(net, 2, size) for size in (6, 9)]

    expected = steps()
    net.load_state_dict(initial)
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch) as graphs:
        actual = steps()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert [graph.replays for graph in graphs] == [2, 2, 2, 2]
    assert net.forward.passes.forward_graph is graphs[2]


def test_evaluation_replays_nothing(monkeypatch):
    net, views = Net(3), torch.randn(4, 3, 6, 6)
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch) as graphs:
        with torch.no_grad():
            net(views)
        net.eval()
        net(views[:2])
        assert not graphs
        net.train()
        net(views)
        net.eval()
        assert torch.equal(net(views)[0], net(views)[0])  # no dropout
        assert [graph.replays for graph in graphs] == [1, 0]


def test_numbers_of_the_host_are_captured(monkeypatch):
    """The stand-in does not run Python again: what a graph cannot follow shows as a difference."""
    net = Net(0)
    net.encoder = net.encoder[:-1]
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch):
        z = net(views := torch.randn(4, 3, 6, 6))[0].clone()
        net.scale = 2.0
        assert torch.equal(net(views)[0], z)


def test_a_failed_capture_changes_no_buffer(monkeypatch):
    net = Net(3)
    net.encoder.append(nn.Module())
    net.encoder[-1].forward = lambda h: h / h.max().item()
    net.forward = GraphedForward(net)
    with graphs_on_the_cpu(monkeypatch), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        net(torch.randn(4, 3, 6, 6))
    assert net.encoder[1].num_batches_tracked == 0 and not net.encoder[1].running_mean.any()


@pytest.fixture
def graphed(monkeypatch):
    """`Session.to_device` with graphs, on a CPU."""
    monkeypatch.setattr(session, "available_cores", lambda: torch.get_num_threads())
    monkeypatch.setattr("engine.batch_norm.fuse_batch_norm", lambda module: None)  # no operation of torch: not recorded
    AcceleratorState._reset_state(reset_partial_state=True)
    to_device = Session.to_device

    def to_device_with_graphs(self, module, view_sizes=1):
        module = to_device(self, module, view_sizes)
        module.forward = GraphedForward(module)
        return module

    return to_device_with_graphs


def test_no_graph_of_an_earlier_step_is_alive_when_another_size_is_recorded(monkeypatch, tmp_path, graphed):
    """It would hold the last nodes of the weights, which belong to the default stream and invalidate a recording."""
    record, replay, nodes, alive = CapturedPasses.__init__, CapturedPasses.__call__, [], []

    def recording(self, *arguments):
        alive.append(sum(node() is not None for node in nodes))
        record(self, *arguments)

    def replaying(self, views):
        outputs = replay(self, views)
        nodes.append(weakref.ref(outputs[0].grad_fn))
        return outputs

    monkeypatch.setattr(CapturedPasses, "__init__", recording)
    monkeypatch.setattr(CapturedPasses, "__call__", replaying)
    monkeypatch.setattr(Session, "to_device", graphed)
    data = texture_shards(tmp_path / "data", train=48)
    options = f"--preset textures --data {data} --encoder.name test_resnet --encoder.width 1 --batch-size 16 --epochs 2"
    options += f" --views.size-schedule 16:1 --precision fp32 --no-report --trackers none --out {tmp_path / 'run'}"
    with graphs_on_the_cpu(monkeypatch):
        train.pretrain(parse(PRETRAIN, options.split(), prog="train.py"))
    assert len(nodes) == 6 and alive == [0, 0]


@pytest.mark.parametrize("name", ["test_vit"])
def test_encoders_can_be_captured(monkeypatch, name):
    """A wait, a copy from the host or its random numbers would raise, see `tests.fake_cuda`."""
    monkeypatch.setattr(cuda_graph, "WARM_UP_PASSES", 1)
    encoder = create_encoder(encoder_spec(EncoderConfig(name), 32))
    features = feature_dim(encoder, 32)
    net = SimCLR(encoder, projection_head(HeadConfig(hidden=32, out=16), features), features, classes=10)
    with fake_cuda(monkeypatch) as waits:
        net.to("cuda", memory_format=torch.channels_last)
        net.forward = GraphedForward(net)
        for _ in range(2):
            before = waits.launches
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                z, logits = net(torch.empty(8, 3, 32, 32, device="cuda"))
            torch.autograd.backward([z, logits], [torch.ones_like(z), torch.ones_like(logits)])
    assert waits.launches - before < 10 and z.shape == (8, 16) and logits.dtype == torch.float32
    assert all((w.grad is not None) == w.requires_grad for w in net.parameters())


def test_a_run_with_graphs_equals_an_eager_one(monkeypatch, tmp_path, graphed):
    """Fine-tuning with the guard, LARS, and evaluations of the same network between the epochs."""
    data = texture_shards(tmp_path / "data", train=48, test=20)
    options = f"--preset textures --data {data} --encoder.name test_resnet --encoder.width 1 --labels.fraction 1"
    options += " --batch-size 16 --epochs 2 --log-every 1 --validate-every 1 --optim.name lars --precision fp32"
    options += " --no-report --trackers none --out"
    runs = []
    for name in ("eager", "graphs"):
        with graphs_on_the_cpu(monkeypatch) as graphs, monkeypatch.context() as patch:
            if name == "graphs":
                patch.setattr(Session, "to_device", graphed)
            AcceleratorState._reset_state(reset_partial_state=True)
            finetune.finetune(parse(FINETUNE, [*options.split(), str(tmp_path / name)], prog="finetune.py"))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        shown = [[row.get(key) for key in ("step", "loss", "gradient_norm", "top1")] for row in rows]
        runs.append((shown, load_file(tmp_path / name / "model.safetensors")))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 8
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=0, atol=0)
    assert [graph.replays for graph in graphs] == [6, 6]
