"""Objective + loop → weights: objectives, optimizers, schedules, metrics, and the loop that joins them."""
