"""Recognizes the errors of a GPU in what an engine raised, whatever library made them."""

import re
from collections.abc import Iterator
from enum import StrEnum

from gpuworker.engines.base import error_text

#: Classes of torch, by name: torch is not imported here, and may not be installed.
_MEMORY_CLASS, _FAILED_CLASS = "OutOfMemoryError", "AcceleratorError"
_MEMORY = re.compile(r"out of memory|(?<!StatusCode\.)RESOURCE_EXHAUSTED|_STATUS_ALLOC_FAILED", re.IGNORECASE)
_FAILED = re.compile(  # whole words, and names in capitals: "relationship error" and "customer_status_bad" are no GPU's
    r"\b(CUDA|HIP|cuDNN|MIOpen|NCCL|XPU) (error|failure)|\bTriton Error|\bcudaError|\bCUDA_ERROR_|\bhipError"
    r"|(?-i:\b(CU|HIP|ROC)[A-Z]+_STATUS_)|device-side assert|illegal memory access",
    re.IGNORECASE,
)
#: Their messages quote what a function was given, which may be anything.
_QUOTING = (ValueError, TypeError, LookupError)


class DeviceFault(StrEnum):
    """What is wrong with the GPU."""

    #: It had no memory left. A process that releases what it holds can use it again.
    MEMORY = "memory"
    #: No call succeeds any more in this process: its context is lost.
    FAILED = "failed"


def find_device_fault(fault: BaseException) -> DeviceFault | None:
    """The fault of a GPU that an exception, or one that it was raised from, tells of; the worst if there are two."""
    found = {_fault_of(each) for each in _chain(fault)}
    return next((each for each in (DeviceFault.FAILED, DeviceFault.MEMORY) if each in found), None)


def _fault_of(fault: BaseException) -> DeviceFault | None:
    classes = {base.__name__ for base in type(fault).__mro__}
    text = "" if isinstance(fault, _QUOTING) else error_text(fault)
    if _MEMORY_CLASS in classes or _MEMORY.search(text):
        return DeviceFault.MEMORY
    if _FAILED_CLASS in classes or _FAILED.search(text):
        return DeviceFault.FAILED
    return None


def _chain(fault: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    left: list[BaseException | None] = [fault]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
