"""Engines: what turns a config into optimiser steps. They hold no mathematics and do not import
each other."""
