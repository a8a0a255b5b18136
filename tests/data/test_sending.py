"""What is scaled on a device has the numbers of what is scaled here, bit for bit: one field, and whole loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcsdl.data.sending import Sender
from tests.data.test_loading import Screen, fingerprint
from tests.data.test_preprocessing import change, make
from tests.gpu import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shading", [False, True])
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16)])
@pytest.mark.parametrize(("crop", "downsample"), [(None, 1), ((24, 24), 1), (None, 2), ((30, 33), 3)])
def test_the_numbers_are_those_of_apply(device, channels, dtype, shading, crop, downsample):
    """Crop, turns, flips, down-sampling (9 has no exact inverse), shading, scaling and jitter, into channels_last, in every orientation."""
    made, sender = make(channels, shading=shading, crop_px=crop, downsample=downsample), Sender(device)
    image = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (channels, 41, 52), dtype=dtype, endpoint=True)
    turns = (0, 1, 2, 3) if crop == (24, 24) else (0, 2)
    cases = [None] + [
        change(channels, n, rows, columns, (5, 7) if crop else (0, 0)) for n in turns for rows in (0, 1) for columns in (0, 1)
    ]
    images = sender.empty((len(cases), *made.output_shape(image.shape)))
    sent = [sender.send(image, made.conversion(image.shape, "p", case), place) for case, place in zip(cases, images, strict=True)]
    sender.receive(images, sent)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for case, found in zip(cases, images.cpu(), strict=True):
        np.testing.assert_array_equal(found.numpy(), made.apply(image, "p", case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 3])
def test_loaders_give_the_same_mini_batches_on_a_device(tmp_path, device, workers):
    """In training and evaluation, with a field that cannot be read among them."""
    screen = Screen(tmp_path)
    screen.harm(3)

    def seen(sender: Sender | None) -> list[str]:
        train = screen.train(workers=workers, on_bad_image="skip", sender=sender)
        evaluate = screen.evaluate(workers=workers, on_bad_image="skip", sender=sender)
        batches = [batch for step in train for batch in step] + list(evaluate)
        assert all(batch.images.device == batch.labels.device == (device if sender else torch.device("cpu")) for batch in batches)
        assert all(batch.rows.device.type == "cpu" for batch in batches)
        return [text for batch in batches for text in fingerprint([type(batch)(batch.images.cpu(), batch.labels.cpu(), batch.rows)])]

    expected = seen(None)
    assert len(expected) == 20 + 11
    assert seen(Sender(device)) == expected
