"""Conversations and instructions as ids."""

from mpjax.data.chat.chat import Chat, Message
from mpjax.data.chat.chat_template import ChatTemplate

__all__ = ["Chat", "ChatTemplate", "Message"]
