"""What runs on a device, and where: shards, replicas, tasks and pools."""
