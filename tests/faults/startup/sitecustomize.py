"""Python imports this at its start if the folder is on PYTHONPATH."""

from tests.faults.kill_switch import arm_from_environment

arm_from_environment()
