"""What is true of machines, models and weight formats. Imports nothing else of qwenfit."""

from .box import devices_of
from .device_names import device, devices
from .errors import BadInput, QwenfitError, UnknownName, Unsupported
from .formats import weight_format
from .model_catalog import model, models

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
