"""The engines, which turn a config into optimiser steps. They contain no mathematics and do not
import each other."""
