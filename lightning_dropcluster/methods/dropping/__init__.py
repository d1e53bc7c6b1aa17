"""How `ClusterDrop` drops: a way for each kind of device, memory format and filling, with equal results."""
