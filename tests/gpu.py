"""Marks for tests that need GPUs; on a machine without they are skipped."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_two_gpus = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="no two GPUs")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
DEVICES = [pytest.param(torch.device("cpu"), id="cpu"), pytest.param(torch.device("cuda", 0), id="cuda", marks=needs_gpu)]
