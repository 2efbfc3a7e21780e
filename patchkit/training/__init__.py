"""Training: conversion of softmax attention to linear attention, and heads that draft."""
