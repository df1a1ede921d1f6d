"""Tiers below memory: local disks and object stores. Knows images and layouts; never trainers, groups or torch."""
