"""What a run's compiled programs need of devices: found ahead of time, without the devices."""
