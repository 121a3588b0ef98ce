"""Meshes, sharding rules and chip facts."""

from sharding.mesh import MeshConfig, make_mesh

__all__ = ["MeshConfig", "make_mesh"]
