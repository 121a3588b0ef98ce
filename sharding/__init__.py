"""Holds meshes, sharding rules, chip facts and pipeline schedules."""

from sharding.mesh import MeshConfig, make_mesh

__all__ = ["MeshConfig", "make_mesh"]
