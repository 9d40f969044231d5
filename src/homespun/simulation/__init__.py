"""Simulation of many clients in one process or many: the fastest way to learn what will work on devices."""
