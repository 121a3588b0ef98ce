"""Training: `train(config)` is the whole run, `resume(folder)` goes on with one, `SavedRun` opens one for use."""

from jaxlm.train.loop import TrainResult, resume, train
from jaxlm.train.saved_run import SavedRun

__all__ = ["SavedRun", "TrainResult", "resume", "train"]
