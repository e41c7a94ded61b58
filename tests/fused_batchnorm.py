"""The CUDA kernels behind synchronized batch norm, in tensor operations for any device; fake CUDA tensors included.

They check what the kernels demand of their arguments: dtypes, shapes and layouts that a GPU would refuse or misread.
"""

import torch


def substitute(monkeypatch):
    """Replace the kernels, which exist for CUDA only, for the duration of a test."""
    for kernel in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        monkeypatch.setattr(torch, f"batch_norm_{kernel.__name__}", kernel)


def stats(x, eps):
    x = _wide(_packed(x))
    mean = x.mean(_axes(x))
    variance = (x - _like(mean, x)).square().mean(_axes(x))
    return mean, torch.rsqrt(variance + eps)


def gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    world_size, channels = means.shape
    assert (
        invstds.shape == means.shape and channels == x.shape[1] == len(running_mean) and counts.shape == (world_size,)
    )
    assert {t.dtype for t in (means, invstds, running_mean, running_var, counts)} == {_wide(x).dtype}
    counts, variances = counts[:, None], invstds**-2 - eps
    n = counts.sum(0)
    mean = (means * counts).sum(0) / n
    squares = ((variances + (means - mean).square()) * counts).sum(0)
    running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    running_var.copy_((1 - momentum) * running_var + momentum * squares / (n - 1))
    return mean, torch.rsqrt(squares / n + eps)


def elemt(x, weight, bias, mean, invstd, eps):
    assert mean.dtype == invstd.dtype == _wide(x).dtype and mean.shape == invstd.shape == (x.shape[1],)
    normalized = (_wide(_packed(x)) - _like(mean, x)) * _like(invstd, x)
    if weight is not None:
        normalized = normalized * _like(weight, x) + _like(bias, x)
    return normalized.to(x.dtype)


def backward_reduce(grad, x, mean, invstd, weight, input_wanted, weight_wanted, bias_wanted):
    assert grad.shape == x.shape and grad.dtype == x.dtype
    dy = _wide(_packed(grad))
    sum_dy = dy.sum(_axes(x))
    sum_dy_xmu = (dy * (_wide(x) - _like(mean, x))).sum(_axes(x))
    sums = (sum_dy, sum_dy_xmu) if input_wanted else (None, None)
    return *sums, sum_dy_xmu * invstd if weight_wanted else None, sum_dy if bias_wanted else None


def backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32 and counts.is_contiguous()
    assert sum_dy.shape == sum_dy_xmu.shape == mean.shape and sum_dy.dtype == sum_dy_xmu.dtype == mean.dtype
    n = counts.sum()
    centered = _wide(x) - _like(mean, x)
    dx = _wide(grad) - _like(sum_dy / n, x) - centered * _like(invstd**2 * sum_dy_xmu / n, x)
    scale = invstd if weight is None else invstd * weight
    return (dx * _like(scale, x)).to(x.dtype)


def _axes(x):
    return [axis for axis in range(x.dim()) if axis != 1]


def _like(per_channel, x):
    return per_channel.view([1, -1] + [1] * (x.dim() - 2))


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _packed(x):
    """The kernels accept other layouts, but read them slowly."""
    assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x
