"""What is true of machines, models and weight formats. Imports nothing else of qwenfit."""

from .device import device, devices, devices_of
from .errors import BadInput, QwenfitError, UnknownName, Unsupported
from .formats import weight_format
from .model import model, models

__all__ = [
    "BadInput",
    "QwenfitError",
    "UnknownName",
    "Unsupported",
    "device",
    "devices",
    "devices_of",
    "model",
    "models",
    "weight_format",
]
