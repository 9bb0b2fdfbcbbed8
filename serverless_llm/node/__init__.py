"""Asyncio shells of a node: controller, agent, worker, checkpoint store."""
