"""Conversations and instructions as ids."""

from mpjax.data.chat.chat import Chat, Message
from mpjax.data.chat.chat_template import ChatTemplate
from mpjax.data.chat.conversations import conversation_examples
from mpjax.data.chat.instructions import instruction_examples

__all__ = ["Chat", "ChatTemplate", "Message", "conversation_examples", "instruction_examples"]
