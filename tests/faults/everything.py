"""Imports every module with scenarios, in the order of the table: those that have the machine to themselves come last."""

from faults import clocks, damage, disks, kills, landings, races, storage

# isort: split
from faults import composed, stacks

__all__ = ["clocks", "composed", "damage", "disks", "kills", "landings", "races", "stacks", "storage"]
