"""Imports every module with scenarios, in the order of the table."""

from faults import clocks, damage, disks, kills, landings, races, stacks, storage

__all__ = ["clocks", "damage", "disks", "kills", "landings", "races", "stacks", "storage"]
