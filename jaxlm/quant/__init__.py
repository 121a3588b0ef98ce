"""Computes in few bits: number formats by paper, rules that give them to layers, packed weights."""
