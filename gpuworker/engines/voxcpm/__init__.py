"""Engine `voxcpm`: speech by VoxCPM2, VoxCPM1.5 and VoxCPM-0.5B through the `voxcpm` package."""
