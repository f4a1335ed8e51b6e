from __future__ import annotations

import pytest

from deltaloom.errors import SettingsError
from deltaloom.train.settings import EarlyStop, TrainSettings, seconds


def test_defaults_stand_in_for_what_is_not_given():
    settings = TrainSettings()
    assert (settings.rows_per_step, settings.batch_tokens, settings.epoch_limit, settings.time_limit) == (16, None, 1.0, None)
    assert settings.given() == {}


@pytest.mark.parametrize(("values", "keys"), [
    ({"epochs": 2, "max_steps": 5}, ["epochs", "max_steps"]),
    ({"batch_size": 2, "batch_tokens": 500}, ["batch_size", "batch_tokens"]),
    ({"optimizer": "sgd", "eps": 1e-6, "betas": (0.5, 0.9)}, ["eps", "betas", "sgd"]),
    ({"momentum": 0.1}, ["momentum", "adamw"]),
    ({"epochs": 2, "max_steps": 5, "momentum": 0.1}, ["epochs", "momentum"]),
])
def test_contradictions_name_every_key(values, keys):
    with pytest.raises(SettingsError) as error:
        TrainSettings(**values)
    assert all(key in str(error.value) for key in keys)


@pytest.mark.parametrize("values", [
    {"epochs": 0}, {"max_steps": 0}, {"learning_rate": 0}, {"warmup": 1.0}, {"clip": 0}, {"max_time": "soon"}, {"max_time": ""},
    {"max_time": "0m"}, {"max_time": -1}, {"eval_every": 0}, {"eval_every": 1.5}, {"save_every": 0.0}, {"betas": (0.9, 1.0)},
    {"optimizer": "adam"}, {"keep_checkpoints": 0}, {"eval_evry": 3}])
def test_illegal_values_name_their_key(values):
    with pytest.raises(SettingsError) as error:
        TrainSettings(**values)
    assert next(iter(values)).split("_")[0] in str(error.value)


@pytest.mark.parametrize(("text", "expected"), [("20m", 1200), ("1h30m", 5400), ("90", 90), ("90s", 90), ("1.5h", 5400),
                                                ("1h 5s", 3605), ("2H", 7200), ("1h2m3s", 3723)])
def test_durations(text, expected):
    assert seconds(text) == expected
    assert TrainSettings(max_time=text).time_limit == expected


def test_time_may_limit_epochs_and_steps_too():
    assert TrainSettings(epochs=3, max_time=60).epoch_limit == 3
    assert TrainSettings(max_time=60).epoch_limit is None


@pytest.mark.parametrize("settings", [
    TrainSettings(), TrainSettings(batch_tokens=512, max_steps=4), TrainSettings(optimizer="sgd", momentum=0.0),
    TrainSettings(early_stop=EarlyStop(patience=2), eval_every=0.25, max_time="5m"), TrainSettings(clip=None, betas=(0.8, 0.95)),
])
def test_all_settings_written_out_read_back_the_same(settings):
    assert TrainSettings.parse(settings.as_dict(), "train") == settings
