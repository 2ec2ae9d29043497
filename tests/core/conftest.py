"""Small models and batches with no weight at zero."""

import pytest
import torch
import video_files

from snapvideo_core import FIT, Conditioning


def conditioning(config, batch, rng, dtype=torch.float32):
    low_res = augmentation = None
    if config.low_res:
        shape = (batch, 3, config.frames, *config.low_res)
        low_res, augmentation = torch.randn(shape, generator=rng), torch.rand(batch, generator=rng)
    text = torch.randn(batch, config.text_length, config.text_dim, generator=rng)
    lengths = torch.arange(batch) % config.text_length
    return Conditioning(
        framerate=torch.rand(batch, generator=rng) * 20 + 4,
        resolution=torch.randint(200, 800, (batch, 2), generator=rng).float(),
        text=text.to(dtype),
        text_mask=torch.arange(config.text_length) <= lengths[:, None],
        low_res=low_res,
        augmentation=augmentation,
    )


def random_fit(config, rng, backend=None):
    """A FIT in evaluation mode whose zero-initialised weights are drawn as well."""
    model = FIT(config, backend=backend).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.add_(0.05 * noise)
    return model


@pytest.fixture(name="conditioning")
def conditioning_fixture():
    return conditioning


@pytest.fixture(name="random_fit")
def random_fit_fixture():
    return random_fit


@pytest.fixture(scope="session")
def movie(tmp_path_factory):
    """75 numbered frames at 25 fps, a keyframe each 12, index in front; about 1 KB a frame."""
    path = tmp_path_factory.mktemp("movie") / "movie.mp4"
    pictures = video_files.count(75, noise=True)
    return video_files.write_video(path, pictures, options={"crf": "30"}, movflags="faststart")
