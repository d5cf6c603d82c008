"""The store: keeps spaces, tokens and requests across restarts of the daemon."""

from relayd.store.base import StorageFull as StorageFull
from relayd.store.base import Store as Store
from relayd.store.base import StoreError as StoreError
from relayd.store.base import StoreInUse as StoreInUse
from relayd.store.factory import OfflineStore as OfflineStore
from relayd.store.factory import open_offline as open_offline
from relayd.store.factory import open_store as open_store
from relayd.store.records import AppendInput as AppendInput
from relayd.store.records import Change as Change
from relayd.store.records import DeleteRequest as DeleteRequest
from relayd.store.records import DeleteSpace as DeleteSpace
from relayd.store.records import DeleteToken as DeleteToken
from relayd.store.records import Loaded as Loaded
from relayd.store.records import PutRequest as PutRequest
from relayd.store.records import PutSpace as PutSpace
from relayd.store.records import PutToken as PutToken
from relayd.store.records import RequestRecord as RequestRecord
from relayd.store.records import SpaceRecord as SpaceRecord
from relayd.store.records import StoredInput as StoredInput
from relayd.store.records import TokenLimits as TokenLimits
from relayd.store.records import TokenRecord as TokenRecord
from relayd.store.records import UpdateRequest as UpdateRequest
